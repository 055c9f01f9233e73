"""The file that keeps what was measured: it outlives the process, and is never trusted further than its checksum and machine."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.tuning_cases import call, new_process
from torchwrap.attention.attend import attend
from torchwrap.attention.dispatch import choose, order
from torchwrap.attention.settings import Settings
from torchwrap.attention.tuning import store
from torchwrap.attention.tuning.kinds import kind_of
from torchwrap.core.errors import ConfigError, TorchwrapWarning


def test_figures_outlive_the_process_in_a_private_file(measure: Settings, clocks: Any) -> None:
    asked, one = clocks({"cpu": 2e-3, "sdpa": 1e-3}), call()
    attend(one.q, one.k, one.v, backend=measure)
    path = store.measurements(one.q.device, measure.tune_dir).path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and json.loads(path.read_bytes())["machine"]["torch"] == torch.__version__
    new_process()
    attend(one.q, one.k, one.v, backend=measure)
    assert len(asked) == 1 and order(one, Settings(tune_dir=measure.tune_dir))[0] == "sdpa"


def test_two_processes_add_to_one_file(measure: Settings) -> None:
    assert measure.tune_dir is not None
    first, second = (store.Measurements(Path(measure.tune_dir), {"torch": "x"}) for _ in range(2))
    first.add(("a", 1), {"cpu": 1.0, "sdpa": 2.0})
    second.add(("b", 2), {"cpu": 2.0, "sdpa": 1.0})
    assert set(store.Measurements(Path(measure.tune_dir), {"torch": "x"}).orders) == {("a", 1), ("b", 2)}


def _cut(said: bytes) -> bytes:
    return said[: said.index(b"processor") + 4]


def _edited(said: bytes) -> bytes:
    return said.replace(b"0.002", b"0.0002")


def _foreign(said: bytes) -> bytes:
    content = json.loads(said)
    content["machine"]["processor"] = "another"
    return _signed(content)


def _endless(said: bytes) -> bytes:
    content = json.loads(said)
    content["kinds"][0][1]["cpu"] = 10**400
    return _signed(content)


def _signed(content: dict[str, Any]) -> bytes:
    del content["sha256"]
    content["sha256"] = store.hashlib.sha256(store._canonical(content)).hexdigest()
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, "Unterminated"), (_edited, "changed after"), (_foreign, "it holds for"), (lambda _: b"[]", "no table"),
        (lambda _: b"\xff", "utf"), (_endless, "too large"),
    ],
    ids=["cut", "edited", "foreign", "no table", "no text", "endless"],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_written_anew(
    measure: Settings, clocks: Any, damage: Callable[[bytes], bytes], says: str
) -> None:
    asked, one = clocks({"cpu": 0.002, "sdpa": 0.001}), call()
    attend(one.q, one.k, one.v, backend=measure)
    path = store.measurements(one.q.device, measure.tune_dir).path
    path.write_bytes(damage(path.read_bytes()))
    new_process()
    with pytest.warns(TorchwrapWarning, match=says):
        assert order(one, Settings(tune_dir=measure.tune_dir))[0] == "cpu"
    with warnings.catch_warnings(action="error"):  # it was said
        attend(one.q, one.k, one.v, backend=measure)
    assert len(asked) == 2
    new_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert order(one, Settings(tune_dir=measure.tune_dir))[0] == "sdpa"


def test_a_folder_that_cannot_be_written_to_costs_a_warning(tmp_path: Path, clocks: Any) -> None:
    clocks({"cpu": 2e-3, "sdpa": 1e-3})
    (tmp_path / "file").write_text("")
    measure, one = Settings(tune="measure", tune_dir=str(tmp_path / "file" / "folder")), call()
    with pytest.warns(TorchwrapWarning, match="not kept"):
        attend(one.q, one.k, one.v, backend=measure)
    assert choose(one, measure).backend.name == "sdpa"


@pytest.mark.parametrize("folder", ["a\0b", "~there-is-no-such-user/x"])
def test_a_name_that_no_folder_can_have_is_refused_by_name(folder: str) -> None:
    one = call()
    with pytest.raises(ConfigError, match="names no folder"):
        attend(one.q, one.k, one.v, backend=Settings(tune="measure", tune_dir=folder))
    attend(one.q, one.k, one.v)


def test_figures_of_a_back_end_that_is_no_more_are_passed_over(measure: Settings) -> None:
    one = call()
    store.measurements(one.q.device, measure.tune_dir).add(kind_of(one, "forward"), {"gone": 1e-3, "sdpa": 2e-3, "cpu": 3e-3})
    assert order(one, measure) == ("sdpa", "cpu", "eager")
