"""The Triton kernels in Triton's interpreter. `test_triton.py` runs this file in processes of its own, with TRITON_INTERPRET=1.

The interpreter takes about 20 ms for each tile (triton 3.9), so shapes are as small as they can be with several tiles in each direction,
and cases differ in kind instead of filling a grid. The law of errors is that of all back ends, see cases.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import assert_law, scale_of
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention
from torchwrap.attention.triton import Blocks, Triton, launches
from torchwrap.attention.triton.blocks import INTERPRETER, interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs with TRITON_INTERPRET=1, through test_triton.py")
NAMES = ("q", "k", "v", "sinks", "bias")


def call(
    *, batch: int = 1, heads: int = 2, kv_heads: int = 1, rows: int = 40, columns: int = 56, width: int = 16,
    value_width: int | None = None, dtype: torch.dtype = torch.float32, mask: Any = None, seed: int = 0, **options: Any,
) -> Call:  # fmt: skip
    """A random call. `options` may hold `sinks=True` and `bias=` a shape."""
    source = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(dtype)

    if options.get("sinks"):
        options["sinks"] = random(heads)
    if "bias" in options:
        options["bias"] = random(*options["bias"])
    made = checked(
        random(batch, heads, rows, width), random(batch, kv_heads, columns, width), random(batch, kv_heads, columns, value_width or width),
        mask=mask, **options,
    )  # fmt: skip
    return made if made.bias is None else replace(made, bias=made.bias.requires_grad_())


def textbook(given: Call, dtype: torch.dtype, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {name: getattr(given, name).detach().to(dtype).requires_grad_() for name in NAMES if getattr(given, name) is not None}
    out, lse = attention(replace(given, **leaves))
    # -inf * 0 would be NaN: rows that see nothing pass no gradient on.
    total = (out * grad_out.to(out.dtype)).sum() + (lse * grad_lse.to(lse.dtype))[lse != -math.inf].sum()
    return out.detach(), lse.detach(), dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def check(given: Call, backend: Triton | None = None, *, gradients: bool = True) -> None:
    backend = backend or Triton()
    assert backend.refuses(given) is None
    source = torch.Generator().manual_seed(1)
    out, lse = backend.forward(given)
    assert out.dtype == given.q.dtype and lse.dtype == torch.float32
    grad_out = torch.randn(out.shape, generator=source).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=source)
    exact = textbook(given, torch.float64, grad_out, grad_lse)
    usual = textbook(given, given.q.dtype, grad_out, grad_lse)
    assert_law(out, usual[0], exact[0], "out", scale_of(exact[0]))
    assert_law(lse, usual[1], exact[1], "lse", scale_of(exact[1]))
    if gradients:
        ours = dict(zip(NAMES, backend.backward(given, out, lse, grad_out, grad_lse), strict=True))
        for name, expected in exact[2].items():
            assert ours[name].dtype == getattr(given, name).dtype
            assert_law(ours[name], usual[2][name], expected, f"gradient of {name}", scale_of(*exact[2].values()))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def holes(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)) < 0.7


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) | (k < 20)


MASKS = {
    "none": {},
    "causal": {"mask": lambda: TileMask.causal(1, 40, 56)},
    "causal from the first key": {"mask": lambda: TileMask.causal(1, 40, 56, q_offset=0)},
    "more queries than keys": {"rows": 56, "columns": 40, "mask": lambda: TileMask.causal(1, 56, 40)},
    "one key": {"mask": lambda: TileMask.window(1, 40, 56, 1)},
    "window": {"mask": lambda: TileMask.window(1, 40, 56, 7)},
    "band": {"mask": lambda: TileMask(1, 40, 56, left=30, right=9, q_offset=3)},
    "positions on the device": {"mask": lambda: TileMask.window(1, 40, 56, 30, q_offset=torch.tensor(11))},
    "chunks": {"mask": lambda: TileMask(1, 40, 56, right=0, chunk=24)},
    "shifted chunks": {"batch": 2, "mask": lambda: TileMask(2, 40, 56, right=0, chunk=24, shift=ints(5, 17))},
    "keys of a piece": {"mask": lambda: TileMask(1, 40, 56, right=0, left=25, q_offset=100, kv_offset=60)},
    "padded left": {"batch": 2, "mask": lambda: TileMask.padded([19, 56], 40, 56)},
    "padded right": {"batch": 2, "mask": lambda: TileMask.padded([19, 56], 40, 56, side="right", causal=False)},
    "padding for all": {"batch": 2, "mask": lambda: TileMask(1, 40, 56, kv_start=ints(3), kv_end=ints(50))},
    "nothing at all": {"batch": 2, "mask": lambda: TileMask.padded([0, 56], 40, 56)},
    "holes": {"batch": 2, "mask": lambda: TileMask(2, 40, 56, right=0, key_mask=holes(2, 56))},
}
NEEDS_TILES = {
    "packed": {"rows": 56, "mask": lambda: TileMask(1, 56, 56, right=0, q_segments=packed(), k_segments=packed())},
    "prefix": {"mask": lambda: TileMask.from_function(prefix, 1, 40, 56)},
    "heads of their own": {"batch": 2, "mask": lambda: TileMask.from_dense(torch.rand(2, 2, 40, 56) < 0.4)},
    "piece of a dictionary": {"rows": 24, "columns": 40, "mask": lambda: TileMask.from_function(prefix, 1, 40, 56).sub((9, 33), (5, 45))},
}


def packed() -> Tensor:
    return torch.tensor([[0] * 13 + [1] * 20 + [2] * 4 + [3] * 19], dtype=torch.int32)


class TestMasks:
    @pytest.mark.parametrize("name", MASKS)
    def test_law_holds_forward_and_backward(self, name: str) -> None:
        case = dict(MASKS[name])
        check(call(**{**case, "mask": case["mask"]()} if "mask" in case else case))

    @pytest.mark.parametrize("name", NEEDS_TILES)
    def test_law_holds_where_the_mask_brings_its_tiles(self, name: str) -> None:
        case = dict(NEEDS_TILES[name])
        check(call(**{**case, "mask": case["mask"]()}))


FEATURES = {
    "one head for each": {"heads": 2, "kv_heads": 2},
    "three share one": {"heads": 3, "kv_heads": 1, "rows": 20},
    "many queries": {"rows": 70, "columns": 70, "mask": lambda: TileMask.causal(1, 70, 70)},
    "width 40, values 24": {"width": 40, "value_width": 24},
    "width 80": {"width": 80, "value_width": 16},
    "scale": {"scale": -0.7},
    "bfloat16": {"dtype": torch.bfloat16, "mask": lambda: TileMask.causal(1, 40, 56)},
    "float16": {"dtype": torch.float16, "mask": lambda: TileMask.causal(1, 40, 56)},
    "softcap": {"softcap": 1.5},
    "softcap near zero": {"softcap": 50.0, "scale": 0.02},
    "softcap in float16": {"softcap": 3.0, "dtype": torch.float16},
    "sinks": {"sinks": True, "mask": lambda: TileMask.window(1, 40, 56, 9)},
    "sinks and rows without keys": {"sinks": True, "mask": lambda: TileMask.padded([12], 40, 56)},
    "bias": {"bias": (1, 2, 40, 56)},
    "bias for all heads": {"batch": 2, "bias": (1, 1, 40, 56), "softcap": 2.0},
    "bias of keys": {"batch": 2, "bias": (2, 1, 1, 56)},
    "bias of queries": {"bias": (1, 2, 40, 1)},
    "dropout": {"dropout": 0.3, "mask": lambda: TileMask.causal(1, 40, 56)},
    "everything": {
        "batch": 2, "softcap": 2.0, "sinks": True, "bias": (1, 2, 40, 56), "dropout": 0.1,
        "mask": lambda: TileMask.padded([30, 56], 40, 56),
    },
}  # fmt: skip


class TestFeatures:
    @pytest.mark.parametrize("name", FEATURES)
    def test_law_holds_forward_and_backward(self, name: str) -> None:
        case = dict(FEATURES[name])
        torch.manual_seed(3)
        check(call(**{**case, "mask": case["mask"]()} if "mask" in case else case))


class TestFewQueries:
    @pytest.mark.parametrize("parts", [1, 2, 5])
    def test_parts_of_keys_merge_into_the_whole(self, parts: int) -> None:
        given = call(rows=1, columns=150, heads=6, kv_heads=2, sinks=True, mask=TileMask.causal(1, 1, 150))
        steps, out, lse = launches.forward(given, INTERPRETER, parts=parts)
        assert len(steps) == (1 if parts == 1 else 2)
        for step in steps:
            step.run()
        exact, exact_lse = attention(replace(given, q=given.q.double(), k=given.k.double(), v=given.v.double()), torch.float64)
        assert (out - exact).abs().max() < 1e-6 and (lse - exact_lse).abs().max() < 1e-6

    def test_parts_without_a_visible_key_count_nothing(self) -> None:
        given = call(batch=2, rows=1, columns=150, mask=TileMask.padded([20, 0], 1, 150))
        steps, out, lse = launches.forward(given, INTERPRETER, parts=4)
        for step in steps:
            step.run()
        exact, exact_lse = attention(replace(given, q=given.q.double(), k=given.k.double(), v=given.v.double()), torch.float64)
        assert (out - exact).abs().max() < 1e-6
        assert lse[1].eq(-math.inf).all() and (lse[0] - exact_lse[0]).abs().max() < 1e-6

    def test_long_rows_are_cut_when_the_card_would_idle(self) -> None:
        given = call(rows=1, columns=600, heads=3)
        steps, _, _ = launches.forward(given, INTERPRETER)
        assert [step.grid for step in steps] == [(1, 3), (3,)]
        check(given, gradients=False)

    @pytest.mark.parametrize("mask", ["causal", "window", "holes", "dictionary"])
    def test_a_group_of_heads_shares_its_tile(self, mask: str) -> None:
        masks = {
            "causal": lambda: TileMask.causal(1, 7, 90), "window": lambda: TileMask.window(1, 7, 90, 40),
            "holes": lambda: TileMask(1, 7, 90, key_mask=holes(1, 90)), "dictionary": lambda: TileMask.from_dense(holes(7, 90)[None, None]),
        }  # fmt: skip
        given = call(rows=7, columns=90, heads=6, kv_heads=2, mask=masks[mask]())
        assert launches.packed_heads(given) == 3
        check(given, gradients=False)


    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 2.0}], ids=str)
    def test_keys_in_pages_are_read_where_they_lie(self, parts: int, options: dict[str, Any]) -> None:
        """Three sequences in pages of 8 rows, in any order, the first page shared; between them rows that nobody may read."""
        memory, lengths = 200, [70, 5, 33]
        source = torch.Generator().manual_seed(3)
        order = torch.randperm(memory // 8, generator=source).tolist()
        shared, rows = order.pop(), []
        for length in lengths:
            pages = [shared, *(order.pop() for _ in range((length - 1) // 8))]
            rows.append(torch.tensor([page * 8 + row for page in pages for row in range(8)])[:length])
        given = call(batch=3, rows=1, columns=memory, heads=6, kv_heads=2, value_width=8, **options)
        k, v = given.k[:1].clone(), given.v[:1].clone()
        for tensor in (k, v):
            tensor[:, :, [row for row in range(memory) if row not in torch.cat(rows)]] = math.nan
        ends = torch.tensor(lengths).cumsum(0)
        mask = TileMask(3, 1, sum(lengths), kv_start=(ends - torch.tensor(lengths)).int(), kv_end=ends.int())
        paged = replace(given, k=k.expand(3, -1, -1, -1), v=v.expand(3, -1, -1, -1), mask=mask)
        steps, out, lse = launches.forward(paged, INTERPRETER, parts=parts, table=torch.cat(rows).int(), longest=70)
        for step in steps:
            step.run()
        for index, held in enumerate(rows):
            one = replace(given, q=given.q[index : index + 1].double(), k=k[:, :, held].double(), v=v[:, :, held].double())
            exact, exact_lse = attention(one, torch.float64)
            assert (out[index] - exact[0]).abs().max() < 1e-6 and (lse[index] - exact_lse[0]).abs().max() < 1e-6


class TestAttend:
    def test_gradients_flow_through_the_public_function(self) -> None:
        made = call(mask=TileMask.causal(1, 40, 56), sinks=True, bias=(1, 2, 40, 56))
        tensors = {name: getattr(made, name).detach().requires_grad_() for name in NAMES}
        found = {}
        for backend in ("triton", "eager"):
            out, lse = attend(**tensors, mask=made.mask, backend=backend, return_lse=True)
            found[backend] = torch.autograd.grad(out.square().sum() + lse.sum(), list(tensors.values()))
        for ours, expected in zip(found["triton"], found["eager"], strict=True):
            assert torch.allclose(ours, expected, atol=2e-5)

    def test_a_bias_that_requires_nothing_costs_no_pass(self) -> None:
        made = call(bias=(1, 2, 40, 56))
        assert made.bias is not None
        out, lse = Triton().forward(made)
        steps = [len(launches.backward(made.for_gradients(wanted), INTERPRETER, out, lse, out, None)[0]) for wanted in (True, False)]
        assert steps == [4, 3]


class TestProperties:
    @pytest.mark.parametrize("blocks", [Blocks(queries=16, keys=32), Blocks(queries=64, keys=16)], ids=["16x32", "64x16"])
    def test_tiles_of_any_shape_give_the_same(self, blocks: Blocks) -> None:
        check(call(mask=TileMask.window(1, 40, 56, 20), sinks=True), Triton(blocks))

    def test_any_layout_of_the_inputs_is_read(self) -> None:
        given = call(heads=2, kv_heads=2)
        out, lse = Triton().forward(given)
        turned = replace(
            given, q=given.q.transpose(1, 2).contiguous().transpose(1, 2), k=given.k.transpose(2, 3).contiguous().transpose(2, 3),
            v=torch.cat([given.v, given.v], -1)[..., :16],
        )  # fmt: skip
        other, other_lse = Triton().forward(turned)
        assert torch.equal(out, other) and torch.equal(lse, other_lse)

    def test_what_lies_outside_of_padding_is_never_touched(self) -> None:
        clean = call(batch=2, mask=TileMask.padded([19, 56], 40, 56))
        k, v = clean.k.clone(), clean.v.clone()
        k[0, :, :37], v[0, :, :37] = math.nan, math.nan
        dirty = replace(clean, k=k, v=v)
        backend = Triton()
        (out, lse), (other, other_lse) = backend.forward(clean), backend.forward(dirty)
        assert torch.equal(out, other) and torch.equal(lse, other_lse)
        gradients = (backend.backward(given, out, lse, torch.ones_like(out), None) for given in (clean, dirty))
        for one, two in zip(*gradients, strict=True):
            assert one is two is None or torch.equal(one, two)

    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
    def test_numbers_that_are_none_reach_the_result_as_in_the_textbook(self, value: float) -> None:
        given = call(mask=TileMask.causal(1, 40, 56))
        k, v = given.k.clone(), given.v.clone()
        # Key 30 is seen by some rows, value 10 by all; of hidden ones only those in a tile somebody sees are multiplied (by zero).
        k[0, 0, 30], v[0, 0, 10, 3] = value, value
        given = replace(given, k=k, v=v)
        (out, _), (expected, _) = Triton().forward(given), attention(given)
        assert torch.equal(out.isfinite(), expected.isfinite()) and not expected.isfinite().all()

    def test_parts_of_a_backward_add_up(self) -> None:
        given = call(mask=TileMask.causal(1, 40, 56))
        backend = Triton()
        out, lse = backend.forward(given)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        whole = backend.backward(given, out, lse, grad, None)
        assert given.mask is not None
        pieces = [
            backend.backward(
                replace(given, k=given.k[:, :, a:b], v=given.v[:, :, a:b], mask=given.mask.sub(columns=(a, b))), out, lse, grad, None
            )
            for a, b in ((0, 21), (21, 56))
        ]
        assert torch.allclose(whole[0], pieces[0][0] + pieces[1][0], atol=1e-5)
        for place in (1, 2):
            assert torch.allclose(whole[place], torch.cat([piece[place] for piece in pieces], 2), atol=1e-5)

    def test_products_of_bfloat16_are_still_wrong_in_the_interpreter(self) -> None:
        # The reason for `widen` (triton 3.9): when this fails, the interpreter can run what cards run.
        import triton
        import triton.language as tl

        @triton.jit
        def multiply(x, y, z):  # type: ignore[no-untyped-def]
            at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
            tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))

        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        z = torch.zeros(32, 32)
        multiply[(1,)](x, x, z)
        assert not torch.allclose(z, x.float() @ x.float(), atol=1.0)

    @pytest.mark.parametrize("shape", [(0, 40, 56), (1, 0, 56), (1, 40, 0)], ids=["no row of the batch", "no query", "no key"])
    def test_nothing_gives_nothing(self, shape: tuple[int, int, int]) -> None:
        batch, rows, columns = shape
        given = call(batch=batch, rows=rows, columns=columns, sinks=True)
        out, lse = Triton().forward(given)
        assert out.shape == (batch, 2, rows, 16) and not out.any()
        assert given.sinks is not None and torch.equal(lse, given.sinks[None, :, None].expand(batch, 2, rows))
        grad_q, _, _, grad_sinks, _ = Triton().backward(given, out, lse, torch.ones_like(out), torch.ones_like(lse))
        assert grad_q.shape == given.q.shape
        assert grad_sinks is not None and torch.equal(grad_sinks, torch.full((2,), float(batch * rows)))
