"""Safetensors files: hostile headers are refused, honest ones read exactly like the format's own library reads them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from torchwrap.core.errors import CorruptDataError, StorageError, UnsafePathError
from torchwrap.storage import TensorFile, index_folder
from torchwrap.storage.header import _DTYPES


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


MALFORMED = {
    "empty file": None,
    "length beyond file": (b"{}", b"", 1000),
    "length near 2^64": (b"{}", b"", 2**64 - 1),
    "not a table": (b"[1]", b"", None),
    "leading space": (b" {}", b"", None),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "cut JSON": (b'{"a": {', b"", None),
    "deep nesting": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", None),
    "NaN": (b'{"__metadata__": NaN}', b"", None),
    "huge integer": (b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"", None),
    "duplicate name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        bytes(2),
        None,
    ),
    "duplicate key inside": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', bytes(1), None),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", None),
    "metadata a list": ({"__metadata__": []}, b"", None),
    "entry a list": ({"a": [1]}, b"", None),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None),
    "extra field": ({"a": entry(extra=1)}, bytes(8), None),
    "unknown dtype": ({"a": entry("Q7")}, bytes(8), None),
    "dtype a list": ({"a": entry(["F32"])}, bytes(8), None),
    "negative dimension": ({"a": entry(shape=[-2])}, bytes(8), None),
    "boolean dimension": ({"a": entry("F64", shape=[True])}, bytes(8), None),
    "float dimension": ({"a": entry(shape=[2.0])}, bytes(8), None),
    "shape a number": ({"a": entry(shape=2)}, bytes(8), None),
    "product overflows 2^64": ({"a": entry(shape=[2**32, 2**32, 2])}, bytes(8), None),
    "ten thousand dimensions": ({"a": entry(shape=[1] * 10_000 + [2])}, bytes(8), None),
    "length differs from shape": ({"a": entry(shape=[3])}, bytes(8), None),
    "reversed offsets": ({"a": entry(offsets=[8, 0])}, bytes(8), None),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, bytes(8), None),
    "beyond the end": ({"a": entry(offsets=[0, 8])}, bytes(4), None),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), None),
    "same place twice": ({"a": entry(), "b": entry()}, bytes(8), None),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), None),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), None),
    "bytes left over": ({"a": entry()}, bytes(9), None),
    "odd packed pair": ({"a": entry("F4", shape=[2, 1], offsets=[0, 1])}, bytes(1), None),
}


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_refused(tmp_path: Path, case: tuple[object, bytes, int | None] | None) -> None:
    path = tmp_path / "model.safetensors"
    if case is None:
        path.write_bytes(b"")
    else:
        write(path, *case)
    with pytest.raises(CorruptDataError, match=str(path)):
        TensorFile.open(path)


def test_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_200)
    with pytest.raises(CorruptDataError, match="100000000"):
        TensorFile.open(path)


def test_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry("F6_E2M3", shape=[4], offsets=[0, 3])}, bytes(3))
    with pytest.raises(StorageError, match="F6_E2M3") as caught:
        TensorFile.open(path)
    assert not isinstance(caught.value, CorruptDataError)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_files_are_never_accepted_when_safetensors_refuses_them(tmp_path: Path, data: st.DataObject) -> None:
    header = json.dumps({"a": entry(), "b": entry("U8", [3], [8, 11])}).encode()
    content = bytearray(struct.pack("<Q", len(header)) + header + bytes(range(11)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 12))] = data.draw(st.integers(32, 126) | st.integers(0, 255))
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        ours = {name: (s.dtype, s.shape) for name, s in TensorFile.open(path).segments.items()}
    except StorageError:
        return
    theirs = load_file(path)
    assert ours == {name: (t.dtype, tuple(t.shape)) for name, t in theirs.items()}


@pytest.mark.parametrize("dtype", _DTYPES.values(), ids=_DTYPES.keys())
def test_every_type_is_read_like_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(96, dtype=torch.uint8).remainder(2 if dtype == torch.bool else 128)
    path = tmp_path / "model.safetensors"
    try:
        save_file({"odd": torch.ones(3, dtype=torch.uint8), "x": raw.view(dtype).reshape(2, -1)}, path)
        expected = load_file(path)["x"]
    except (KeyError, SafetensorError) as reason:
        pytest.skip(f"this safetensors does not write {dtype}: {reason}")
    found = TensorFile.open(path).view("x")
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_view_shares_the_file_and_never_writes_to_it(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    before = checkpoint.read_bytes()
    with TensorFile.open(checkpoint) as file:
        views = {name: file.view(name) for name in file.segments}
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert views["wide"].data_ptr() % 4096 == load_offset(checkpoint, "wide") % 4096
    views["wide"].zero_()
    assert checkpoint.read_bytes() == before


def load_offset(path: Path, name: str) -> int:
    with TensorFile.open(path) as file:
        return file.segments[name].offset


def test_misaligned_tensor_is_copied_and_right(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}
    path = write(tmp_path / "a.safetensors", header, b"\1" + struct.pack("<2f", 1.5, -2.0))
    assert TensorFile.open(path).view("b").tolist() == [1.5, -2.0]


def test_segments_and_metadata_equal_the_library(checkpoint: Path) -> None:
    save_file({"a": torch.ones(3)}, checkpoint, metadata={"format": "pt"})
    file = TensorFile.open(checkpoint)
    with safe_open(checkpoint, "pt") as theirs:
        assert dict(file.metadata) == theirs.metadata()
        assert list(file.segments) == list(theirs.keys())


def change_by_truncating(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def change_by_replacing(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    os.replace(other, path)


def change_by_writing(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"x")


@pytest.mark.parametrize("change", [change_by_truncating, change_by_writing], ids=["truncated", "written"])
def test_changed_file_is_noticed(checkpoint: Path, change: object) -> None:
    file = TensorFile.open(checkpoint)
    os.utime(checkpoint, ns=(1, 1))
    file = TensorFile.open(checkpoint)
    file.check_unchanged()
    change(checkpoint)  # type: ignore[operator]
    with pytest.raises(CorruptDataError):
        file.check_unchanged()
    with pytest.raises(CorruptDataError):
        file.view("wide")


def test_a_file_whose_name_another_took_stays_readable(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = TensorFile.open(checkpoint)
    change_by_replacing(checkpoint)
    file.check_unchanged()
    assert torch.equal(file.view("wide"), tensors["wide"])


def test_deleted_file_stays_readable(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = TensorFile.open(checkpoint)
    checkpoint.unlink()
    file.check_unchanged()
    assert torch.equal(file.view("wide"), tensors["wide"])


def test_pickled_file_opens_again_and_refuses_another_header(checkpoint: Path) -> None:
    content = pickle.dumps(TensorFile.open(checkpoint))
    assert "wide" in pickle.loads(content).segments
    save_file({"other": torch.ones(2)}, checkpoint)
    with pytest.raises(CorruptDataError):
        pickle.loads(content)


def test_descriptors_close_when_the_last_user_lets_go(checkpoint: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    file = TensorFile.open(checkpoint)
    held = file.fd(True)
    file.close()
    file.close()
    os.fstat(held)
    with pytest.raises(StorageError):
        file.fd(False)
    del held
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused_without_hanging(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(StorageError, match=str(path)):
        TensorFile.open(path)


def sharded(folder: Path, weight_map: object) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_folder_is_indexed_through_links_too(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "blobs").mkdir()
    (tmp_path / "two.safetensors").rename(tmp_path / "blobs" / "hash")
    (tmp_path / "two.safetensors").symlink_to("blobs/hash")
    found = index_folder(tmp_path)
    assert {name: file.view(segment.name).tolist() for name, (file, segment) in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_single_file_folder_is_indexed(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert set(index_folder(checkpoint.parent)) == set(tensors)


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": "gone.safetensors"}, StorageError),
        ({"b": "one.safetensors"}, CorruptDataError),
        ({"a": "../one.safetensors"}, UnsafePathError),
        ({"a": "/etc/passwd"}, UnsafePathError),
        ({"a": "x/../one.safetensors"}, UnsafePathError),
        ({"a": "one.safetensors\0"}, UnsafePathError),
        ({"a": ".."}, UnsafePathError),
        ({"a": ""}, UnsafePathError),
        ({"a": 3}, CorruptDataError),
        (["a"], CorruptDataError),
        (None, CorruptDataError),
    ],
    ids=str,
)
def test_bad_index_is_refused(tmp_path: Path, weight_map: object, expected: type[Exception]) -> None:
    sharded(tmp_path, weight_map)
    with pytest.raises(expected, match=str(tmp_path)):
        index_folder(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="save_pretrained"):
        index_folder(tmp_path)
