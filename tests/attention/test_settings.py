"""What the caller of `attend` decides, and how it gets into compiled graphs."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.settings import Settings, settings_of
from torchwrap.core.errors import ConfigError, UnsupportedModelError


@pytest.mark.parametrize(
    "given",
    [
        Settings(),
        Settings(backend="sdpa"),
        Settings(tune="off", tune_dir="/a b", deterministic=True),
        Settings(backend="triton", block_m=64, num_stages=3),
    ],
)
def test_settings_are_the_same_after_a_graph_has_held_them_as_text(given: Settings) -> None:
    assert settings_of(given.text) == given == settings_of(given)


def test_settings_can_be_changed_copied_and_sent_to_other_processes() -> None:
    given = replace(Settings(tune="off"), deterministic=True)
    assert given.text == Settings(tune="off", deterministic=True).text
    for other in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert other == given and other.text == given.text and hash(other) == hash(given)


def test_settings_that_are_a_name_are_that_name() -> None:
    assert Settings(backend="eager").text == "eager" and settings_of("eager") == Settings(backend="eager")


@pytest.mark.parametrize("wrong", [{"tune": "always"}, {"deterministic": "yes"}, {"backend": None}, {"tune_dir": 3}])
def test_values_of_another_kind_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=repr(next(iter(wrong.values())))):
        Settings(**wrong)  # type: ignore[arg-type]


def test_attend_takes_settings_in_place_of_a_name() -> None:
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    assert torch.equal(attend(x, x, x, backend=Settings(backend="eager")), attend(x, x, x, backend="eager"))
    with pytest.raises(UnsupportedModelError, match="cuda_mma"):
        attend(x, x, x, backend=Settings(backend="cuda_mma"))
    with pytest.raises(ConfigError, match="backend is a int"):
        attend(x, x, x, backend=3)  # type: ignore[call-overload]


@pytest.mark.parametrize("text", ["o'clock", 'a "b" {c}', "back\\slash", "ü\udc80", "\n"])
def test_folders_of_any_name_are_kept(text: str) -> None:
    assert settings_of(Settings(tune_dir=text).text).tune_dir == text


def test_settings_can_be_made_in_a_compiled_function() -> None:
    x = torch.randn(1, 2, 3, 8)

    def function(x: torch.Tensor, deterministic: bool) -> torch.Tensor:
        return attend(x, x, x, backend=Settings(backend="eager", tune="off", tune_dir="a 'b'", deterministic=deterministic))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for deterministic in (True, False):
        torch.testing.assert_close(compiled(x, deterministic), function(x, deterministic))


def test_settings_that_are_none_are_named_by_a_compiled_function_too() -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="tune='always' is unknown"):
        torch.compile(lambda x: attend(x, x, x, backend=Settings(tune="always")), fullgraph=True, backend="eager")(x)  # type: ignore[arg-type]


def test_a_compiled_graph_keeps_the_settings() -> None:
    x, given = torch.randn(1, 2, 3, 8), Settings(tune="off", deterministic=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x, backend=given)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"block_m": 48}, "power of two from 16 to 256"), ({"block_n": 8}, "power of two"), ({"num_warps": 3}, "power of two"),
        ({"num_stages": 0}, "from 1 to 8"), ({"block_m": 64.0}, "block_m=64.0"), ({"num_warps": True}, "num_warps=True"),
        ({"block_m": 64, "backend": "auto"}, "no effect with backend='auto'"),
    ],
)  # fmt: skip
def test_tiles_that_are_none_or_have_no_effect_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**{"backend": "triton", **wrong})  # type: ignore[arg-type]


def test_tiles_reach_the_kernel_or_are_refused_with_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.attention import dispatch
    from torchwrap.attention.contract import checked
    from torchwrap.attention.triton import backend
    from torchwrap.attention.triton.blocks import Card, Fixed

    monkeypatch.setattr(backend, "_missing", lambda: None)
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "card_of", lambda device: Card(capability=80, shared_bytes=64 << 10, processors=40))
    x = torch.randn(1, 2, 64, 128).half()
    found = dispatch.choose(checked(x, x, x), Settings(backend="triton", block_m=32, num_warps=2)).backend
    assert found.blocks == Fixed(queries=32, warps=2)  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"block_m=256: the forward pass needs \d+ bytes .* 65536 bytes") as caught:
        attend(x, x, x, backend=Settings(backend="triton", block_m=256))
    assert "Leave out block_m" in caught.value.fix
    with pytest.raises(UnsupportedModelError, match="float64"):
        attend(x.double(), x.double(), x.double(), backend=Settings(backend="triton", block_m=32))


def test_a_named_back_end_that_is_not_deterministic_is_refused_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.attention.reference import Eager

    monkeypatch.setattr(Eager, "deterministic", False, raising=False)
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    out = attend(x, x, x, backend=Settings(backend="eager", deterministic=True))
    with pytest.raises(UnsupportedModelError, match="deterministic=True"):
        out.sum().backward()
