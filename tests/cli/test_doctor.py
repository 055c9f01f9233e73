"""doctor measures and says what hurts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Done
from torchwrap.storage.uring import unavailable_reason


def test_doctor_measures_the_disk_and_leaves_nothing_behind(cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli("doctor", "--path", tmp_path, "--bytes", "16MiB", "--json")
    found = done.data
    assert found["disk"]["read_bytes_per_s"] > 0
    assert found["disk"]["write_bytes_per_s"] > 0
    assert found["copies"]["host_bytes_per_s"] > 0
    assert found["memory"]["available"] > 0
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_versions_and_integrations(cli: Callable[..., Done]) -> None:
    found = cli("doctor", "--no-measure", "--json").data
    assert found["versions"]["torch"]
    assert found["disk"]["io_uring"] == (f"no ({reason})" if (reason := unavailable_reason()) else "yes")
    assert {row["name"] for row in found["integrations"]} >= {"transformers", "torchvision"}
    assert all(row["loads"] or row["reason"] for row in found["integrations"])


def test_doctor_exits_with_one_when_there_is_a_problem(cli: Callable[..., Done], monkeypatch: object) -> None:
    done = cli("doctor", "--no-measure", "--json")
    assert done.status == (1 if done.data["problems"] else 0)


def test_doctor_text_has_a_line_for_everything(cli: Callable[..., Done], tmp_path: Path) -> None:
    text = cli("doctor", "--path", tmp_path, "--bytes", "4MiB").out
    for word in ("versions", "cpu", "cuda", "memory", "disk", "copy", "integration", "problem"):
        assert word in text
