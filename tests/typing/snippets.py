"""What type checkers must infer from the public names: what goes in comes out. Checked by `test_typing.py`, never run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from typing_extensions import assert_type

import torchwrap as tw
from torchwrap.attention.attend import attend
from torchwrap.fast_attention.handle import FastAttentionHandle


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def function_on_an_instance(net: Net) -> None:
    assert_type(tw.trace(net), Net)
    assert_type(tw.trace(net, where="inside"), Net)
    assert_type(tw.trace(net, tw.Trace()), Net)


def decorator_on_a_class() -> None:
    @tw.trace
    class Bare(nn.Module):
        width: int = 1

    @tw.trace(where="inside")
    class Configured(nn.Module):
        width: int = 2

    assert_type(Bare().width, int)
    assert_type(Configured().width, int)
    assert_type(tw.trace(Net), type[Net])


def decorator_on_a_factory() -> None:
    @tw.trace
    def make(width: int) -> Net:
        return Net()

    @tw.trace(where="inside")
    def make_more(width: int, *, depth: int = 2) -> tuple[Net, str]:
        return Net(), ""

    assert_type(make(3), Net)
    assert_type(make_more(3, depth=4), tuple[Net, str])


def apply_and_undo(net: Net, configs: Sequence[tw.Config]) -> None:
    assert_type(tw.apply(net, tw.Trace()), Net)
    assert_type(tw.apply(net, [tw.Trace()]), Net)
    assert_type(tw.apply(net, configs, strict=False), Net)
    assert_type(tw.apply(net, tw.plan_of(net)), Net)
    assert_type(tw.unwrap(net), Net)
    assert_type(tw.unwrap(net, "trace"), Net)
    assert_type(tw.unwrap(net, tw.Trace), Net)
    assert_type(tw.unwrap(Net), type[Net])


def contexts(net: Net) -> None:
    with tw.applied(net, tw.Trace()) as inner:
        assert_type(inner, Net)
    with tw.disabled(net, "trace"):
        pass
    manager: AbstractContextManager[Net] = tw.applied(net, [tw.Trace()])
    del manager


def inspection(net: Net) -> None:
    assert_type(tw.wrappers_of(net), dict[str, tw.Config])
    assert_type(tw.plan_of(net), tw.Plan)
    assert_type(tw.describe(net), tw.Report)
    assert_type(tw.check(net, configs=[tw.Trace()]), tw.Report)
    with tw.core.tensors(net, "weight", write=True) as real:
        assert_type(real, dict[str, torch.Tensor])


def errors(error: tw.BudgetError) -> None:
    assert_type(error.needed, int)
    memory: MemoryError = error
    base: tw.TorchwrapError = error
    del memory, base


def attention_says_what_it_returns(q: torch.Tensor, wanted: bool) -> None:
    assert_type(attend(q, q, q), torch.Tensor)
    assert_type(attend(q, q, q, return_lse=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(attend(q, q, q, return_lse=wanted), torch.Tensor | tuple[torch.Tensor, torch.Tensor])
    assert_type(attend(q, q, q, need_rows=[0]), tuple[torch.Tensor, torch.Tensor])
    assert_type(attend(q, q, q, need_rows=q, return_lse=True), tuple[torch.Tensor, torch.Tensor, torch.Tensor])


def scope_gives_a_handle_or_the_model(net: Net) -> None:
    assert_type(tw.fast_attention(net, backend="cpu"), Net)
    assert_type(tw.fast_attention.scope(), AbstractContextManager[FastAttentionHandle])
    assert_type(tw.fast_attention.scope(None, backend="cpu"), AbstractContextManager[FastAttentionHandle])
    assert_type(tw.fast_attention.scope(net, backend="cpu"), AbstractContextManager[Net])
    assert_type(tw.fast_attention.explain(net), str)
