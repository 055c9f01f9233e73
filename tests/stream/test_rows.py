"""Tables read row by row: what `F.embedding` gives, its gradient, its errors, and every changed byte found."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.stream.parts import write_tensors
from torchwrap.core.errors import CorruptDataError
from torchwrap.core.tensors import bind, data_of, placeholder
from torchwrap.storage import SpillStore, aio
from torchwrap.stream.pieces import put_away
from torchwrap.stream.rows import RowTable
from torchwrap.stream.units import Home, Piece

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def piece_of(module: nn.Embedding, home: Home | None = None, host: torch.Tensor | None = None) -> Piece:
    value = data_of(module.weight)
    return Piece(
        index=0,
        names=["table"],
        parameter=module.weight,
        shape=tuple(value.shape),
        dtype=value.dtype,
        nbytes=value.numel() * value.element_size(),
        residue=0,
        absent=placeholder(value.shape, value.dtype, "cpu"),
        home=home,
        host=host,
        resident=False,
    )


@contextmanager
def table(
    module: nn.Embedding, folder: Path | str, *, gap: int = 0, verify: bool = True, in_host: bool = False
) -> Iterator[tuple[nn.Embedding, RowTable]]:
    """The module with its weight away, and what reads its rows."""
    away = nn.Embedding(
        *module.weight.shape, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq, sparse=module.sparse
    )
    away.weight = nn.Parameter(module.weight.detach().clone(), module.weight.requires_grad)
    if in_host:
        piece = piece_of(away, host=data_of(away.weight).reshape(-1).view(torch.uint8))
    else:
        file = write_tensors(Path(folder, "table.safetensors"), [("table", data_of(module.weight))], [gap])
        segment = file.segments["table"]
        piece = piece_of(away, Home(file, "table", segment.offset, segment.nbytes))
    bind(away.weight, piece.absent)
    with aio.Reader(2, 8192) as reader:
        yield away, RowTable(piece, reader, verify=verify, timeout_s=20.0)


def embedding(rows: int, width: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(rows, width, dtype=dtype, **options)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(
    rows=st.integers(1, 700),
    width=st.one_of(st.integers(1, 40), st.sampled_from([1024, 2000])),
    dtype=st.sampled_from(DTYPES),
    id_type=st.sampled_from([torch.int64, torch.int32]),
    shape=st.sampled_from([(), (0,), (1,), (7,), (3, 0), (2, 9), (2, 3, 4)]),
    gap=st.sampled_from([0, 1, 2, 13, 4095]),
    how=st.sampled_from(["verified", "plain", "host"]),
    seed=st.integers(0, 1000),
)
def test_equal_to_a_lookup_in_the_whole_table(
    rows: int, width: int, dtype: torch.dtype, id_type: torch.dtype, shape: tuple[int, ...], gap: int, how: str, seed: int
) -> None:
    module = embedding(rows, width, dtype)
    generator = torch.Generator().manual_seed(seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        table(module, folder, gap=gap, verify=how == "verified", in_host=how == "host") as (
            away,
            read,
        ),
    ):
        for _ in range(2):
            ids = torch.randint(0, rows, shape, generator=generator).to(id_type)
            with torch.no_grad():
                expected, got = module(ids), read.forward(away, ids)
            assert got.shape == expected.shape and got.dtype == expected.dtype
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("scale", "sparse"), [(False, False), (True, False), (False, True)], ids=["plain", "scaled", "sparse"])
@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("id_type", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_gradients(tmp_path: Path, padding: int | None, scale: bool, sparse: bool, id_type: torch.dtype) -> None:
    module = embedding(50, 6, padding_idx=padding, scale_grad_by_freq=scale, sparse=sparse)
    ids = torch.tensor([[3, 0, 49, 3], [7, 7, 7, 49]], dtype=id_type)
    with table(module, tmp_path) as (away, read):
        for _ in range(2):  # the second adds to the first
            weights = torch.randn(2, 4, 6)
            (module(ids) * weights).sum().backward()
            (read.forward(away, ids) * weights).sum().backward()
        expected, got = module.weight.grad, away.weight.grad
        assert expected is not None and got is not None and got.layout == expected.layout
        assert torch.equal(got.to_dense(), expected.to_dense())


def test_scaled_sparse_gradients_are_refused_as_torch_refuses_them(tmp_path: Path) -> None:
    module = embedding(50, 6, scale_grad_by_freq=True, sparse=True)
    with table(module, tmp_path) as (away, read):
        with pytest.raises(RuntimeError) as expected:
            module(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError) as got:
            read.forward(away, torch.tensor([1])).sum().backward()
        assert str(got.value) == str(expected.value)


def test_gradients_of_gradients(tmp_path: Path) -> None:
    module = embedding(20, 5)
    ids, v = torch.tensor([1, 1, 4]), torch.randn(3, 5)
    with table(module, tmp_path) as (away, read):
        results = []
        for one, lookup in ((module, module), (away, lambda ids: read.forward(away, ids))):
            scale = torch.tensor(2.0, requires_grad=True)
            (first,) = torch.autograd.grad((lookup(ids) * v * scale).sum(), one.weight, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), scale)
            results.append(second)
        assert torch.equal(*results)


def test_a_frozen_table_has_no_gradient(tmp_path: Path) -> None:
    module = embedding(20, 5).requires_grad_(False)
    with table(module, tmp_path) as (away, read):
        assert not read.forward(away, torch.tensor([1])).requires_grad


@pytest.mark.parametrize("ids", [[20], [-1], [3, 99, 4], [-20, 19]], ids=str)
@pytest.mark.parametrize("in_host", [False, True], ids=["disk", "host"])
def test_ids_out_of_range_are_refused_as_torch_refuses_them(tmp_path: Path, ids: list[int], in_host: bool) -> None:
    module = embedding(20, 5)
    with table(module, tmp_path, in_host=in_host) as (away, read):
        with pytest.raises(IndexError) as expected:
            module(torch.tensor(ids))
        with pytest.raises(IndexError) as got:
            read.forward(away, torch.tensor(ids))
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("id_type", [torch.float32, torch.bool, torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("in_host", [False, True], ids=["disk", "host"])
def test_ids_of_another_type_are_refused_as_torch_refuses_them(tmp_path: Path, id_type: torch.dtype, in_host: bool) -> None:
    module, ids = embedding(20, 5), torch.tensor([1, 0]).to(id_type)
    with table(module, tmp_path, in_host=in_host) as (away, read):
        with pytest.raises(RuntimeError) as expected:
            module(ids)
        with pytest.raises(RuntimeError) as got:
            read.forward(away, ids)
        assert str(got.value) == str(expected.value)


def flip(path: Path, offset: int) -> None:
    """Another bit at this byte, the same time of change."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@settings(max_examples=25)
@given(st.integers(2, 300), st.integers(1, 33), st.sampled_from(DTYPES), st.data())
def test_a_row_that_changed_is_found(rows: int, width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    module = embedding(rows, width, dtype)
    row = data.draw(st.integers(0, rows - 1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), table(module, folder) as (away, read):
        read.forward(away, torch.tensor([0]))
        home = read.piece.home
        assert home is not None
        size = width * dtype.itemsize
        flip(home.file.path, home.offset + row * size + data.draw(st.integers(0, size - 1)))
        with pytest.raises(CorruptDataError, match=f"row {row} of table"):
            read.forward(away, torch.tensor([row, (row + 1) % rows]))
        others = torch.tensor([other for other in range(rows) if other != row])
        assert torch.equal(read.forward(away, others), module(others))


@pytest.mark.parametrize("width", [3, 4, 5, 8], ids=lambda width: f"{2 * width} bytes per row")
def test_a_table_that_changed_before_its_first_use_is_found(tmp_path: Path, width: int) -> None:
    module = embedding(100, width, torch.bfloat16)
    store = SpillStore.create(tmp_path / "store")
    try:
        piece = piece_of(module)
        piece.home = put_away(store, piece, data_of(module.weight))
        flip(piece.home.file.path, piece.home.offset + 31)
        bind(module.weight, piece.absent)
        with aio.Reader() as reader, pytest.raises(CorruptDataError, match="table"):
            RowTable(piece, reader, verify=True, timeout_s=20.0).forward(module, torch.tensor([99]))
    finally:
        store.close()


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    module = embedding(5000, 64)
    with table(module, tmp_path, verify=False) as (away, read), torch.no_grad():
        read.forward(away, torch.tensor([17, 17, 4000, 17]))
        assert read.bytes_read == 2 * 256


def test_more_rows_than_the_scratch_memory_takes(tmp_path: Path) -> None:
    module = embedding(3000, 1024)
    ids = torch.randperm(3000)[:2500]
    with table(module, tmp_path, gap=3) as (away, read), torch.no_grad():
        assert torch.equal(read.forward(away, ids), module(ids))
        read.free()
        assert torch.equal(read.forward(away, ids), module(ids))


def test_new_values_are_not_compared_with_the_old_sums(tmp_path: Path) -> None:
    module = embedding(30, 4)
    with table(module, tmp_path) as (away, read), torch.no_grad():
        read.forward(away, torch.tensor([1]))
        other = embedding(30, 4)
        other.weight.mul_(3)
        file = write_tensors(tmp_path / "other.safetensors", [("table", data_of(other.weight))])
        segment = file.segments["table"]
        read.piece.home, read.piece.checksum = Home(file, "table", segment.offset, segment.nbytes), None
        read.forget(read.piece)
        assert torch.equal(read.forward(away, torch.tensor([1, 29])), other(torch.tensor([1, 29])))
