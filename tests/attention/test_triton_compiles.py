"""The Triton kernels compiled for cards that are not there: matrix instructions are used, and shared memory stays below what was counted.

Every case is compiled with the arguments it would be launched with. Cases differ in card, dtype, width and features at once; the whole grid
takes minutes and is there for when kernels change: TORCHWRAP_TRITON_GRID=1. Triton keeps compiled kernels in its own cache, so only a first
run is slow.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton_compiler import MATRIX_INSTRUCTION, card, compiled
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.triton import Blocks, launches
from torchwrap.attention.triton.blocks import interpreted, shared_bytes
from torchwrap.attention.triton.launches import Launch

pytestmark = pytest.mark.skipif(interpreted(), reason="kernels under TRITON_INTERPRET=1 are not compiled")
PASSES: dict[str, Any] = {"forward_kernel": "forward", "keys_kernel": "keys", "queries_kernel": "queries", "bias_kernel": "bias"}
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def call(dtype: torch.dtype, width: int, *, rows: int = 256, columns: int = 256, value_width: int | None = None, **options: Any) -> Call:
    q = torch.zeros(1, 4, rows, width, dtype=dtype)
    k, v = torch.zeros(1, 2, columns, width, dtype=dtype), torch.zeros(1, 2, columns, value_width or width, dtype=dtype)
    return checked(q, k, v, **options)


def every_launch(given: Call, capability: int) -> dict[str, Launch]:
    there = card(capability)
    steps, out, lse = launches.forward(given, there)
    steps = steps + launches.backward(given, there, out, lse, torch.zeros_like(out), None)[0]
    return {step.kernel.__name__: step for step in steps}


def assert_sound(launch: Launch, given: Call, capability: int, folder: Path) -> None:
    result = compiled(launch, capability)
    assert result.shared_bytes <= card(capability).shared_bytes
    if result.name not in PASSES:
        return
    arguments = launch.arguments
    blocks = Blocks(queries=arguments["BLOCK_M"], keys=arguments["BLOCK_N"], warps=launch.warps, stages=launch.stages)
    counted = shared_bytes(PASSES[result.name], blocks, given.q.dtype, given.width, given.value_width, card(capability))
    assert result.shared_bytes <= counted <= card(capability).shared_bytes
    if capability < 80:
        assert result.count("mma") == 0, "triton multiplies by matrix instructions below 8.0 again: see blocks.widen"
        return
    # Tiles of 16 or 32 queries are too small for the instructions of 9.0 and 10.0, which take 64 rows; the older ones serve there.
    assert result.count(MATRIX_INSTRUCTION[capability]) + result.count("mma.sync") > 0
    if result.name == "forward_kernel" and blocks.queries >= 64:
        assert result.count(MATRIX_INSTRUCTION[capability]) > 0
    usage = result.usage(folder)
    # What is spilled once around a loop costs nothing; tiles that do not fit the registers at all spill ten times this.
    assert usage["STACK"] <= 1024


def causal(rows: int = 256, columns: int = 256) -> TileMask:
    return TileMask.causal(1, rows, columns)


CASES: list[tuple[int, str, torch.dtype, int, dict[str, Any]]] = [
    (80, "forward_kernel", F16, 64, {"mask": causal()}),
    (80, "keys_kernel", BF16, 64, {"mask": TileMask.window(1, 256, 256, 100), "softcap": 5.0}),
    (86, "forward_kernel", BF16, 128, {"mask": TileMask.padded([200], 256, 256), "softcap": 30.0}),
    (86, "queries_kernel", F16, 128, {"mask": causal()}),
    (89, "forward_kernel", F32, 64, {}),
    (89, "bias_kernel", F16, 64, {"bias": torch.zeros(1, 4, 256, 256, dtype=F16, requires_grad=True)}),
    (90, "forward_kernel", BF16, 128, {"mask": causal()}),
    (90, "keys_kernel", F16, 128, {"mask": causal(), "dropout": 0.1}),
    (90, "queries_kernel", BF16, 64, {"mask": TileMask(1, 256, 256, right=0, chunk=64)}),
    (100, "forward_kernel", F16, 128, {"sinks": torch.zeros(4), "mask": TileMask.window(1, 256, 256, 64)}),
    (120, "forward_kernel", F16, 80, {"rows": 1, "columns": 4096, "value_width": 40}),
    (120, "combine_kernel", F16, 64, {"rows": 1, "columns": 4096, "sinks": torch.zeros(4)}),
    (120, "prepare_kernel", BF16, 128, {}),
    (75, "forward_kernel", F16, 64, {"mask": causal()}),
    (61, "forward_kernel", F32, 64, {"rows": 1, "columns": 4096}),
    (60, "forward_kernel", BF16, 64, {"rows": 1, "columns": 4096}),
]
GRID = [
    (capability, kernel, dtype, width, {"mask": causal()})
    for capability, kernel, dtype, width in itertools.product(MATRIX_INSTRUCTION, PASSES, (F16, BF16, F32), (64, 128, 256))
    if kernel != "bias_kernel"
]


@pytest.mark.parametrize(
    ("capability", "kernel", "dtype", "width", "options"),
    CASES + (GRID if os.environ.get("TORCHWRAP_TRITON_GRID") == "1" else []),
    ids=lambda value: str(value).removeprefix("torch.") if not isinstance(value, dict) else "-".join(value) or "plain",
)
def test_kernel_compiles_within_the_card(
    capability: int, kernel: str, dtype: torch.dtype, width: int, options: dict[str, Any], tmp_path: Path
) -> None:
    given = call(dtype, width, **options)
    assert_sound(every_launch(given, capability)[kernel], given, capability, tmp_path)


@pytest.mark.parametrize("mask", ["packed", "dictionary"])
def test_masks_that_bring_their_tiles_compile(mask: str, tmp_path: Path) -> None:
    segments = torch.arange(256, dtype=torch.int32)[None] // 60
    masks = {
        "packed": lambda: TileMask(1, 256, 256, right=0, q_segments=segments, k_segments=segments),
        "dictionary": lambda: TileMask.from_function(lambda b, h, q, k: (k <= q) | (k < 20), 1, 256, 256),
    }
    given = call(F16, 64, mask=masks[mask]())
    assert_sound(every_launch(given, 80)["forward_kernel"], given, 80, tmp_path)


@pytest.mark.parametrize(("capability", "dtype"), [(75, F16), (90, BF16)])
def test_keys_in_pages(capability: int, dtype: torch.dtype) -> None:
    """Single queries of eight sequences over one memory: the same kernel with a table, and the merge of its parts."""
    given, ends = call(dtype, 64, rows=1, columns=4096), torch.arange(1, 9, dtype=torch.int32) * 500
    mask = TileMask(8, 1, 4000, kv_start=ends - 500, kv_end=ends)
    given = replace(given, q=given.q.expand(8, -1, -1, -1), k=given.k.expand(8, -1, -1, -1), v=given.v.expand(8, -1, -1, -1), mask=mask)
    table = torch.zeros(4000, dtype=torch.int32)
    steps, out, _ = launches.forward(given, card(capability), table=table, longest=500)
    assert out.shape == (8, 4, 1, 64) and steps[0].arguments["kv_length"] == 4000
    for step in steps:
        result = compiled(step, capability)
        assert result.shared_bytes <= card(capability).shared_bytes
    plain = next(iter(launches.forward(replace(given, mask=TileMask(8, 1, 4096)), card(capability))[0]))
    assert compiled(steps[0], capability).shared_bytes <= compiled(plain, capability).shared_bytes
