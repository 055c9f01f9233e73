"""A streamed model that is converted with `.to(dtype)` computes what the plain model converted alike does, tables of rows included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.stream.units import LEAF_BYTES


class Reader(nn.Module):
    """A table of which only rows are read, blocks, and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(LEAF_BYTES // (4 * width) + 9, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def reader(width: int) -> Reader:
    torch.manual_seed(4)
    return Reader(width).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 5000, (2, 9), generator=torch.Generator().manual_seed(2))


VERBS = [("bfloat16", "float"), ("half", "float"), ("double", "float"), ("double", "half", "float")]


@pytest.mark.parametrize("verbs", VERBS, ids="-".join)
@pytest.mark.parametrize("called_before", [True, False], ids=["called", "fresh"])
@pytest.mark.parametrize("verify", ["first", "always", "header"])
@pytest.mark.parametrize("width", [48, 7])  # rows of whole words, and others
def test_a_table_is_converted_with_the_model(verbs: tuple[str, ...], called_before: bool, verify: str, width: int) -> None:
    model, plain = tw.offload(reader(width), params="disk", verify=verify), reader(width)  # type: ignore[arg-type]
    assert "table" in [unit.name for unit in tw.handle_of(model, "offload").units if unit.kind == "rows"]
    if called_before:
        assert torch.equal(model(ids()), plain(ids()))
    for verb in verbs:
        getattr(model, verb)(), getattr(plain, verb)()
        for _ in range(2):
            assert torch.equal(model(ids()), plain(ids()))
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    tw.unwrap(model)
    assert torch.equal(model(ids()), plain(ids()))
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("verb", ["bfloat16", "double"])
def test_a_table_is_unwrapped_right_after_its_conversion(verb: str) -> None:
    model, plain = tw.offload(reader(48), params="disk"), reader(48)
    model(ids())
    getattr(model, verb)(), getattr(plain, verb)()
    tw.unwrap(model)
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), plain.parameters(), strict=True))
