"""Where pieces land in a slot: inside it, apart from each other, and at the alignment of the original."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchwrap as tw
from tests.models import by_name, run
from tests.stream.fake_arena import FakeArena, Machine, stand_in
from tests.stream.parts import Stored, build, check_bound, plan_for, using, write_tensors
from torchwrap.core.tensors import data_of
from torchwrap.storage import aio
from torchwrap.stream.arena import Arena, HostArena
from torchwrap.stream.engine import Engine
from torchwrap.stream.pieces import read_piece

# element counts of float32 and bytes of filler between them: pages, nearly pages, gaps that are merged and gaps that are not
COUNTS = st.one_of(st.integers(2, 3000), st.sampled_from([1023, 1024, 1025, 2048, 4096]))
GAPS = st.one_of(st.integers(0, 50).map(lambda n: 4 * n), st.sampled_from([0, 4, 60, 4092, 4096, 8188, 8192, 8196, 20000]))
units = st.lists(st.lists(COUNTS, min_size=1, max_size=5), min_size=1, max_size=3)


def arena_of(separate: bool) -> Arena:
    return FakeArena(Machine("early")) if separate else HostArena()


def use_all(stored: Stored, arena: Arena) -> None:
    """Every unit through one slot: the bytes, and the alignment where they are computed with."""
    with aio.Reader(2, 8192) as reader:
        engine = Engine(stored.units, plan_for(stored, 1), arena, reader)
        for unit in stored.units:
            with using(engine, unit):
                check_bound(stored, unit)
                for piece in unit.pieces:
                    shown = data_of(piece.parameter)
                    assert shown.data_ptr() % 64 == (0 if arena.separate else piece.residue)
                spans = sorted((start, start + piece.nbytes) for piece, start in engine.layout(unit).places)
                assert all(first[1] <= second[0] for first, second in pairwise(spans))
                assert spans[-1][1] <= engine.plan.slot_bytes
        engine.close()


@settings(max_examples=60)
@given(units, st.lists(GAPS, min_size=15, max_size=15), st.booleans(), st.booleans())
def test_pieces_land_whole_and_aligned(sizes: list[list[int]], gaps: list[int], separate: bool, keep: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stored = build(Path(folder, "weights.safetensors"), sizes, gaps=gaps, keep_residue=keep, residue=8)
        use_all(stored, arena_of(separate))


@pytest.mark.parametrize("separate", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("gap", [4096, 8192], ids=lambda gap: f"{gap} between")
@pytest.mark.parametrize("first", [4, 4096 - 64], ids=lambda first: f"{first} before")
def test_pages_with_gaps_between_them_fit(tmp_path: Path, separate: bool, gap: int, first: int) -> None:
    """Weights of whole pages with a bias between each two, as in a block of width 2048 in float32."""
    stored = build(tmp_path / "weights.safetensors", [[4096] * 4], gaps=[first, gap, gap, gap])
    use_all(stored, arena_of(separate))


@pytest.mark.parametrize("residue", range(0, 64, 4))
def test_every_residue(tmp_path: Path, residue: int) -> None:
    stored = build(tmp_path / "weights.safetensors", [[500, 1024, 7]], keep_residue=False, residue=residue)
    use_all(stored, HostArena())


@pytest.mark.parametrize("separate", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("odd", [1, 2, 3])
def test_a_file_that_packs_types_without_alignment(tmp_path: Path, odd: int, separate: bool) -> None:
    # The format allows it: an odd number of bytes before a float32. No tensor can be made there, so the piece was at 0 modulo 64.
    stored = build(tmp_path / "weights.safetensors", [[500, 1024], [7, 7]], gaps=[odd], keep_residue=False, residue=0)
    use_all(stored, arena_of(separate))


def test_close_pieces_are_one_read(tmp_path: Path) -> None:
    stored = build(tmp_path / "weights.safetensors", [[1000, 1000, 1000]], gaps=[0, 64, 512])
    with aio.Reader() as reader:
        engine = Engine(stored.units, plan_for(stored, 1), HostArena(), reader)
        assert len(engine.layout(stored.units[0]).regions) == 1
        assert engine.layout(stored.units[0]).read_bytes == 12000 + 64 + 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8], ids=str)
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = build(tmp_path / "weights.safetensors", [[500, 33], [1024]], dtype=dtype)
    use_all(stored, HostArena())


@pytest.mark.parametrize("odd", [1, 6], ids=lambda odd: f"{odd} bytes before")
@pytest.mark.parametrize("separate", [False, True], ids=["host", "device"])
def test_a_checkpoint_that_packs_types_without_alignment(tmp_path: Path, odd: int, separate: bool) -> None:
    plain = by_name("llama").build()
    folder = tmp_path / "model"
    plain.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", [(name, value) for name, value in plain.state_dict().items()], [odd])
    expected = run(plain, by_name("llama").inputs()).logits
    with pytest.MonkeyPatch.context() as patch:
        if separate:
            stand_in(patch, Machine("late"))
        model = tw.offload.from_pretrained(folder, params="disk", device_memory="1MiB")
        for _ in range(2):
            assert torch.equal(run(model, by_name("llama").inputs()).logits, expected)
        with tw.core.tensors(model) as real:
            assert all(torch.equal(real[name], value) for name, value in plain.named_parameters())
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        tw.unwrap(model)
        assert torch.equal(run(model, by_name("llama").inputs()).logits, expected)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 63, 64, 4095])
@pytest.mark.parametrize("residue", [0, 4, 60])
@pytest.mark.parametrize("in_host", [False, True], ids=["disk", "host"])
def test_a_private_copy_of_a_piece(tmp_path: Path, offset: int, residue: int, in_host: bool) -> None:
    arena = FakeArena(Machine("early"))
    stored = build(
        tmp_path / "weights.safetensors",
        [[999]],
        gaps=[offset],
        keep_residue=False,
        residue=residue,
        in_host=frozenset({0} if in_host else ()),
        arena=arena,
    )
    piece = stored.units[0].pieces[0]
    with aio.Reader() as reader:
        value = read_piece(piece, reader, 20.0, verify=True)
    assert torch.equal(value, stored.values[0]) and value.data_ptr() % 64 == residue
    value.zero_()  # private: nothing else changes
    with aio.Reader() as reader:
        assert torch.equal(read_piece(piece, reader, 20.0, verify=True), stored.values[0])
