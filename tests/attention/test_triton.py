"""The back end "triton" without a card: its kernels in Triton's interpreter, its refusals, and how tiles shrink to fit.

The interpreter has to be chosen before triton is imported, and other tests import it, so the cases of `triton_cases.py` run in processes
of their own, one for each group.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchwrap.attention.contract import checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.triton import Blocks, Triton, backend, conditions, launches
from torchwrap.attention.triton.blocks import Card, Fixed, choose, excess, interpreted, shared_bytes, widen

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
H100 = Card(capability=90, shared_bytes=227 << 10, processors=132)
T4 = Card(capability=75, shared_bytes=64 << 10, processors=40)


def call(rows: int = 8, columns: int = 8, width: int = 16, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    q, k = torch.zeros(1, 4, rows, width, dtype=dtype), torch.zeros(1, 2, columns, width, dtype=dtype)
    return checked(q, k, k, **options)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("group", ["TestMasks", "TestFeatures", "TestFewQueries or TestAttend or TestProperties"])
def test_kernels_in_the_interpreter(group: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py"), "-k", group]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_nothing_imports_triton_before_a_kernel_is_needed() -> None:
    code = "import sys, torchwrap.attention.triton.launches; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1]).returncode == 0


def test_missing_package_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend._missing.cache_clear()
    try:
        assert Triton().refuses(call()) == "the package triton is not installed"
    finally:
        monkeypatch.undo()
        backend._missing.cache_clear()


@needs_triton
def test_old_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.3.1")
    backend._missing.cache_clear()
    try:
        assert "3.3.1" in str(Triton().refuses(call()))
    finally:
        monkeypatch.undo()
        backend._missing.cache_clear()


@needs_triton
@pytest.mark.skipif(interpreted(), reason="in the interpreter the CPU will do")
def test_tensors_on_the_cpu_are_the_reason() -> None:
    assert "cpu" in str(Triton().refuses(call()))


@needs_triton
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"dtype": torch.float64}, "float64"), ({"width": 264}, "264 elements"), ({"dtype": torch.float16}, "None")],
    ids=["float64", "too wide", "nothing"],
)
def test_dtype_and_width_are_checked(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str) -> None:
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert reason in str(Triton().refuses(call(**options)))


@needs_triton
@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (Card(capability=52, shared_bytes=48 << 10, processors=16), "5.2"),
        (Card(capability=80, shared_bytes=4 << 10, processors=16), "4096 bytes"),
    ],
    ids=["too old", "too small"],
)
def test_the_card_is_checked(monkeypatch: pytest.MonkeyPatch, card: Card, reason: str) -> None:
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "card_of", lambda device: card)
    assert reason in str(Triton().refuses(call()))


@pytest.mark.parametrize("kib", [227, 163, 99, 64, 48, 24])
@pytest.mark.parametrize("kind", ["forward", "keys", "queries", "bias"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_tiles_shrink_until_they_fit(kib: int, kind: Any, width: int) -> None:
    card = Card(capability=80, shared_bytes=kib << 10, processors=40)
    blocks = choose(kind, card, torch.float16, width, width, 4096, Blocks(queries=128, keys=128, stages=4))
    if blocks is None:
        least = Blocks(queries=16, keys=16, stages=1)
        assert shared_bytes(kind, least, torch.float16, width, width, card) > card.shared_bytes
    else:
        assert shared_bytes(kind, blocks, torch.float16, width, width, card) <= card.shared_bytes


FIXED = [Fixed(queries=64), Fixed(keys=64), Fixed(stages=3), Fixed(warps=8, keys=32), Fixed(queries=32, keys=64, warps=4, stages=2)]


@pytest.mark.parametrize("kib", [227, 99, 64, 24])
@pytest.mark.parametrize("kind", ["forward", "keys", "queries", "bias"])
@pytest.mark.parametrize("fixed", FIXED, ids=lambda fixed: "-".join(fixed.given))
def test_what_is_fixed_stays_while_the_rest_shrinks(fixed: Fixed, kind: Any, kib: int) -> None:
    card = Card(capability=86, shared_bytes=kib << 10, processors=40)
    for rows in (1, 4096):
        blocks = choose(kind, card, torch.float16, 128, 128, rows, fixed)
        if blocks is None:
            assert excess(kind, card, torch.float16, 128, 128, fixed) > card.shared_bytes
        else:
            assert {name: getattr(blocks, name) for name in fixed.given} == fixed.given
            assert shared_bytes(kind, blocks, torch.float16, 128, 128, card) <= card.shared_bytes


@needs_triton
def test_fixed_tiles_that_do_not_fit_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "card_of", lambda device: Card(capability=80, shared_bytes=64 << 10, processors=40))
    given = call(dtype=torch.float16, width=128)
    assert Triton(Fixed(queries=32)).refuses(given) is None
    reason = str(Triton(Fixed(queries=256, stages=4)).refuses(given))
    assert "block_m=256, num_stages=4" in reason and "65536 bytes" in reason and "forward pass" in reason


def test_keys_shrink_before_stages_and_stages_before_queries() -> None:
    wanted = Blocks(queries=128, keys=128, stages=3)
    found = [
        choose("forward", Card(capability=80, shared_bytes=kib << 10, processors=40), torch.float16, 64, 64, 4096, wanted)
        for kib in (160, 100, 45, 30)
    ]
    assert found == [
        wanted, Blocks(queries=128, keys=64, stages=3), Blocks(queries=128, keys=32, stages=2), Blocks(queries=64, keys=32, stages=1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "wide"),
    [
        (90, torch.bfloat16, False), (80, torch.bfloat16, False), (75, torch.bfloat16, True), (75, torch.float16, False),
        (75, torch.float32, False),
    ],
)
def test_operands_are_widened_only_where_the_card_has_no_product_for_them(capability: int, dtype: torch.dtype, wide: bool) -> None:
    assert widen(dtype, replace(T4, capability=capability)) is wide


@pytest.mark.parametrize(
    ("columns", "programs", "parts"), [(65536, 8, 33), (65536, 2, 128), (65536, 132, 1), (1000, 8, 4), (256, 1, 1)],
    ids=["two per multiprocessor", "at most 128", "card is full", "no part below 256 keys", "short"],
)  # fmt: skip
def test_keys_are_cut_to_fill_the_card(columns: int, programs: int, parts: int) -> None:
    assert launches.splits(call(rows=1, columns=columns), H100, programs) == parts


def test_a_window_is_cut_by_what_it_sees() -> None:
    assert launches.splits(call(rows=1, columns=65536, mask=TileMask.window(1, 1, 65536, 600)), H100, 2) == 3


@pytest.mark.parametrize("mask", [TileMask.causal(1, 8, 8), TileMask.padded([5], 8, 8), TileMask(1, 8, 8, right=0, left=3, chunk=4)])
def test_rules_become_numbers_and_need_no_tiles(mask: TileMask) -> None:
    found = conditions.arguments(call(mask=mask), 32, 32)
    assert found["tile_bounds"] is None and found["cells"] is None and not found["ALL_EDGES"]


def test_position_on_the_card_is_not_read_back() -> None:
    position = torch.tensor(7)
    found = conditions.arguments(call(mask=TileMask.causal(1, 8, 8, q_offset=position)), 32, 32)
    assert found["q_offset_tensor"] is not None and found["q_offset"] == 0


def test_bands_without_end_stay_within_32_bits() -> None:
    assert conditions.arguments(call(mask=TileMask.window(1, 8, 8, 2**40)), 32, 32)["left"] == 1 << 30


@needs_triton
def test_a_growing_cache_compiles_nothing_anew() -> None:
    """What a kernel is compiled for stays the same from step to step, but for the powers of two of the merge."""
    constants = set()
    for columns in (600, 601, 617, 848, 4096):
        steps, _, _ = launches.forward(call(rows=1, columns=columns, mask=TileMask.causal(1, 1, columns)), H100)
        arguments = steps[0].arguments
        varying = {parameter.name for parameter in steps[0].kernel.params if parameter.do_not_specialize}
        varying |= {name for name, value in arguments.items() if isinstance(value, torch.Tensor) or "stride" in name}
        constants.add(repr(sorted(item for item in arguments.items() if item[0] not in varying)))
    assert len(constants) == 1
