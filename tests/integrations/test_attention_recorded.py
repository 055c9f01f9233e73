"""Wrapped models in graphs that others run: torch.export and torch.jit.trace record the call, and none of the numbers of its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchwrap as tw
from tests.integrations.attending import built, inputs


class Logits(nn.Module):
    """What a recorder can return: tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, attention_mask=seen, use_cache=False)[0]
        return found


def another(ids: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Other tokens, and padding on the other side and in the other row."""
    return ids.flip(-1), seen.flip(0, 1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "how"), [("llama", "export"), ("llama", "strict export"), ("llama", "trace"), ("gemma2", "export"), ("bert", "trace")]
)
@torch.no_grad()
def test_a_padded_batch_is_recorded_and_serves_others(name: str, how: str) -> None:
    given = inputs(name)
    first = given["input_ids"], given["attention_mask"]
    second, plain, wrapped = another(*first), Logits(built(name)), Logits(tw.fast_attention(built(name)))
    if how == "trace":
        graph: Any = torch.jit.trace(wrapped, first, check_trace=False)
    else:
        graph = torch.export.export(wrapped, first, strict=how == "strict export").module()
    for ids, seen in (first, second):
        visible = seen.bool()
        torch.testing.assert_close(graph(ids, seen)[visible], plain(ids, seen)[visible], atol=1e-5, rtol=1e-5)
    assert tw.wrappers_of(wrapped.model)


@torch.no_grad()
def test_lengths_may_be_left_open() -> None:
    given = inputs("llama")
    wrapped, plain = Logits(tw.fast_attention(built("llama"))), Logits(built("llama"))
    open_ = {1: torch.export.Dim("tokens", min=2, max=64)}
    graph = torch.export.export(wrapped, (given["input_ids"], given["attention_mask"]), dynamic_shapes=(open_, open_)).module()
    ids = torch.randint(3, 90, (2, 23))
    torch.testing.assert_close(graph(ids, torch.ones_like(ids)), plain(ids, torch.ones_like(ids)), atol=1e-5, rtol=1e-5)
