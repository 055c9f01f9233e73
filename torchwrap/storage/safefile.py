"""A safetensors file, used where it lies: its bytes read at known offsets, or mapped as tensors.

Models are saved in this format anyway, so streaming from the user's own file needs no second copy on the disk. The header is checked
strictly when the file is opened (see header.py), and the file is watched afterwards: a model streamed from a file that somebody
replaces would otherwise compute with half old, half new weights.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Mapping, MutableSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from torchwrap.core.errors import CorruptDataError, StorageError, UnsafePathError
from torchwrap.storage.checksum import Part
from torchwrap.storage.header import Segment, corrupt, parse_header, read_header, strict_json
from torchwrap.storage.views import map_segment

__all__ = ["Descriptor", "Segment", "TensorFile", "index_folder", "open_direct"]


class Descriptor(int):
    """A file descriptor that closes itself when the last user lets go of it.

    A read under way in another thread holds one, so closing a file can never redirect that read to whatever reuses the number.
    """

    def __del__(self, close: Any = os.close) -> None:
        close(int(self))


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a file looked like when it was opened."""

    size: int
    mtime_ns: int
    inode: tuple[int, int]


class TensorFile:
    """An open safetensors file. Make one with `TensorFile.open`.

    Attributes:
        path: the file.
        segments: tensors by name, in the order of their bytes.
        metadata: the header's own strings.
        header_hash: SHA-256 of the header, hexadecimal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: dict[bool, Descriptor] = {}
        self._closed = False
        fd = self._descriptors[False] = Descriptor(_open_regular(path))
        self._identity = _identity(os.fstat(fd))
        header = read_header(fd, path, self._identity.size)
        self.header_hash: str = hashlib.sha256(header).hexdigest()
        segments, metadata = parse_header(header, path, self._identity.size)
        self.segments: Mapping[str, Segment] = MappingProxyType(segments)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TensorFile:
        """Open a file and check its whole header.

        Raises:
            CorruptDataError: the header breaks a rule of the format.
            StorageError: the file cannot be opened, or holds a type that torch does not have.
        """
        return cls(Path(path))

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self._identity.size

    def fd(self, direct: bool) -> int:
        """A descriptor for reading; with `direct`, past the page cache.

        It stays open while the returned object lives. Raises `OSError` (EINVAL) where the file system refuses O_DIRECT.
        """
        if self._closed:
            raise StorageError("this file was closed", where=str(self.path), fix="Open it again with TensorFile.open(path).")
        found = self._descriptors.get(direct)
        if found is None:
            # Two threads may both open one; the loser closes by itself.
            found = self._descriptors.setdefault(direct, open_direct(self._descriptors[False], self.path))
        return found

    def check_unchanged(self) -> None:
        """Raise `CorruptDataError` if the file was resized or written to since it was opened. Cost: one `fstat`.

        A file that was deleted, or whose name another file took (a checkpoint saved into the folder it came from), counts as unchanged:
        its bytes stay readable, as they were, through the open descriptor.
        """
        try:
            # Closed under a read that goes on: the name is all that is left to look at.
            now = _identity(os.stat(self.path) if self._closed else os.fstat(self.fd(False)))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"the file cannot be checked: {error.strerror}", where=str(self.path)) from error
        if now != self._identity:
            raise CorruptDataError(
                f"the file changed while in use: {_difference(self._identity, now)}",
                where=str(self.path),
                fix="Restore the original file, or unwrap the model and wrap it again with the new one.",
            )

    def part(self, name: str) -> Part:
        """The segment as a part of a read; safetensors files carry no checksum to compare with."""
        segment = self.segments[name]
        return Part(name, segment.offset, segment.nbytes)

    def view(self, name: str, live: MutableSet[mmap.mmap] | None = None) -> torch.Tensor:
        """The tensor itself, backed by the file: nothing is read until it is used, and nothing is copied unless it is misaligned.

        Writing to it changes private memory, never the file. The system may evict and read its pages again at any time, so it must not
        outlive a change of the file (a file truncated under a mapping kills the process with SIGBUS; streaming through a `Reader`
        raises instead).

        Args:
            name: of the tensor.
            live: gets the mapping; see `Views`.

        Raises:
            KeyError: no such tensor.
            CorruptDataError: the file is not the one that was opened.
        """
        segment = self.segments[name]
        self.check_unchanged()
        if not segment.nbytes:
            return torch.empty(segment.shape, dtype=segment.dtype)
        # A mapping of its own: what is written to one view must not show in the next.
        return map_segment(self.fd(False), segment, live)

    def close(self) -> None:
        """Let the descriptors go. Views and reads under way keep working; new ones raise. Calling it again does nothing."""
        self._closed = True
        self._descriptors = {}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> tuple[Path, int, str]:
        return (self.path, self.nbytes, self.header_hash)

    def __setstate__(self, state: tuple[Path, int, str]) -> None:
        # Another process may see a copied folder: inode and time differ there, size and header must not.
        path, size, header_hash = state
        self.__init__(path)  # type: ignore[misc]  # an unpickled file is opened like any other
        if (self.nbytes, self.header_hash) != (size, header_hash):
            raise CorruptDataError("the file is not the one this object was made from", where=str(path), fix="Restore the original file.")

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self.segments)} tensors, {self.nbytes} bytes)"


def index_folder(folder: str | os.PathLike[str]) -> dict[str, tuple[TensorFile, Segment]]:
    """All tensors of a saved model, by name: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        StorageError: neither file is there, or a shard is missing.
        CorruptDataError: the index is malformed, or a shard lacks a tensor that the index places there.
        UnsafePathError: the index names a shard outside the folder.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        file = TensorFile.open(single)
        return {name: (file, segment) for name, segment in file.segments.items()}
    try:
        content = index.read_bytes()
    except OSError as error:
        raise StorageError(
            f"neither {single.name} nor {index.name} can be read",
            where=str(folder),
            fix="Point to the folder that save_pretrained(folder, safe_serialization=True) wrote.",
        ) from error
    places = strict_json(content, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise corrupt(index, "weight_map is not a table of tensor name -> file name")
    shards = {shard: TensorFile.open(_shard_path(folder, shard, index)) for shard in sorted(set(places.values()))}
    result: dict[str, tuple[TensorFile, Segment]] = {}
    for name, shard in places.items():
        segment = shards[shard].segments.get(name)
        if segment is None:
            raise corrupt(index, f"{shard} does not hold {name!r}, which the index places there")
        result[name] = (shards[shard], segment)
    return result


def open_direct(fd: int, path: Path, flags: int = os.O_RDONLY) -> Descriptor:
    """A second descriptor of the file behind `fd`, with O_DIRECT, even if the path names another file by now."""
    try:
        return Descriptor(os.open(f"/proc/self/fd/{int(fd)}", flags | os.O_DIRECT | os.O_CLOEXEC))
    except FileNotFoundError:  # no /proc: open by name and make sure that it is the same file
        found = Descriptor(os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC))
        if not os.path.samestat(os.fstat(found), os.fstat(fd)):
            raise CorruptDataError("the file was replaced while in use", where=str(path), fix="Restore the original file.") from None
        return found


def _open_regular(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: a named pipe must not hang us
    except OSError as error:
        raise StorageError(f"cannot open the file: {error.strerror}", where=str(path), fix="Check the path and its permissions.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageError("not a regular file", where=str(path), fix="Point to a .safetensors file.")
    return fd


def _identity(found: os.stat_result) -> _Identity:
    return _Identity(found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))


def _difference(before: _Identity, now: _Identity) -> str:
    if before.size != now.size:
        return f"{before.size} bytes then, {now.size} now"
    return "it was written to"


def _shard_path(folder: Path, shard: str, index: Path) -> Path:
    # Only plain file names: shards lie beside their index. They may be links (the Hugging Face cache links to its blobs).
    if not shard or "/" in shard or "\\" in shard or "\0" in shard or shard in (".", ".."):
        raise UnsafePathError(f"the index names a shard outside its folder: {shard!r}", where=str(index), fix="Do not use this checkpoint.")
    if not (folder / shard).is_file():
        raise StorageError(f"shard {shard} is missing", where=str(folder), fix="Download or copy the whole folder again.")
    return folder / shard
