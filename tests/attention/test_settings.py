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


@pytest.mark.parametrize("given", [Settings(), Settings(backend="sdpa"), Settings(tune="off", tune_dir="/a b", deterministic=True)])
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


def test_a_compiled_graph_keeps_the_settings() -> None:
    x, given = torch.randn(1, 2, 3, 8), Settings(tune="off", deterministic=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x, backend=given)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))
