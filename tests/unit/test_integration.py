"""The generic integration, and how integrations are found."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.unit.parts import Block, Net, Times
from torchwrap.core import integration as subject
from torchwrap.core.errors import TorchwrapWarning, UnsupportedModelError
from torchwrap.core.integration import Integration, integration_for, integration_for_folder
from torchwrap.core.swap import attach


def _names(model: nn.Module) -> list[str] | None:
    found = Integration().blocks(model)
    return None if found is None else [block.fqn for block in found]


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])


class _Identity(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def test_longest_list_of_one_class_is_the_chain() -> None:
    mixed = nn.Sequential(*[nn.Linear(2, 2), nn.ReLU()] * 4)
    model = nn.ModuleDict({"short": nn.Sequential(Block(), Block()), "long": Net(), "mixed": mixed})
    assert _names(model) == ["long.blocks.0", "long.blocks.1", "long.blocks.2"]


def test_model_that_is_itself_a_container_has_plain_names() -> None:
    assert _names(nn.Sequential(Block(), Block())) == ["0", "1"]


def test_lists_inside_a_member_belong_to_that_block() -> None:
    assert _names(nn.Sequential(_Mixture(), _Mixture())) == ["0", "1"]


def test_among_equally_long_lists_the_larger_one_counts() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(Block(2), Block(2)), "b": nn.Sequential(Block(8), Block(8))})
    assert _names(model) == ["b.0", "b.1"]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.ReLU())], ids=str)
def test_without_repetition_there_are_no_blocks(model: nn.Module) -> None:
    assert _names(model) is None


def test_wrapped_and_parametrized_members_count_as_what_they_are() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    attach(model[0], Times(1.0))
    attach(model[1], Times(1.0))
    parametrize.register_parametrization(model[1], "weight", _Identity())
    parametrize.register_parametrization(model[2], "weight", _Identity())
    assert _names(model) == ["0", "1", "2", "3"]


def test_unknown_model_gets_the_generic_integration() -> None:
    found = integration_for(Net())
    assert (found.name, found.source(Net()), found.activation_bytes(Net(), batch=1, tokens=1)) == ("generic", None, None)
    with found.loading() as state:
        assert not state.active


def test_tied_parameters_are_grouped() -> None:
    model = Net()
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    assert Integration().tied(model) == [["blocks.0.linear.weight", "blocks.1.linear.weight"]]


class Own(Integration):
    """An integration as a third party would publish it."""

    name = "own"
    tested = {"torch": ("1.0", "1.1")}  # noqa: RUF012

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Net)


own = Own()


def test_third_party_integration_is_found_and_warns_once_outside_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("own", "tests.unit.test_integration:own", subject.importlib.metadata.__name__)
    monkeypatch.setattr(EntryPoint, "load", lambda self: own)
    monkeypatch.setattr(subject.importlib.metadata, "entry_points", lambda group: [entry])
    subject._entry_points.cache_clear()
    subject._gate.cache_clear()
    try:
        with pytest.warns(TorchwrapWarning, match=r"torch .* outside .* own .*1\.0 to 1\.1"):
            assert integration_for(Net()) is own
        assert integration_for(Net()) is own and integration_for(nn.Linear(1, 1)).name == "generic"
    finally:
        subject._entry_points.cache_clear()


def test_missing_and_unknown_folders_are_typed_errors_that_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{tmp_path / 'missing'}.*snapshot_download"):
        integration_for_folder(tmp_path / "missing")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModelError, match=rf"a file and no folder.*Give its folder: '{tmp_path}'"):
        integration_for_folder(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=rf"the folder is empty\) \(at {tmp_path}\)"):
        integration_for_folder(tmp_path)
    for name in ("b.txt", "a-model"):
        (tmp_path / name).mkdir()
    with pytest.raises(UnsupportedModelError, match=rf"in it: a-model, b\.txt\) \(at {tmp_path}\)"):
        integration_for_folder(tmp_path)


def test_looking_for_an_integration_imports_no_framework() -> None:
    code = (
        "import sys\nfrom tests.unit.parts import Net\nfrom torchwrap.core.integration import integration_for\n"
        "print(integration_for(Net()).name, 'transformers' in sys.modules, 'torchvision' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.split() == ["generic", "False", "False"]
