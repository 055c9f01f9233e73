"""The small file that says which half of each record is committed, and the folder it lies in.

The manifest is one line with the CRC-32 of the rest, then JSON: generation, name of the data file, the records with their places and sums,
and what the caller keeps beside them. It is only ever replaced as a whole (see atomic.py).
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage.atomic import Lock, as_storage_error, atomic_write, private_folder
from torchwrap.storage.folder import sweep
from torchwrap.storage.generationfile import Record, Version
from torchwrap.storage.header import strict_json
from torchwrap.storage.safefile import Descriptor

__all__ = ["MANIFEST", "Json", "KeptFolder", "Manifest", "pack", "unpack"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MANIFEST = "manifest.json"
_VERSION = 1
_DATA = re.compile(r"^generations-[0-9a-f]{16}\.tws$")
_TEMPORARY = re.compile(r"^\.manifest\.json\.tw-.+\.tmp$")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was committed.

    Attributes:
        generation: number of the commit.
        file: name of the data file.
        records: by name, the committed version as the present one.
        run: what the caller stored beside them.
    """

    generation: int
    file: str
    records: dict[str, Record]
    run: dict[str, Json]


class KeptFolder:
    """A folder of mode 0700 that outlives the process, locked while this object is open.

    Raises:
        StorageError: another process has it, or it cannot be written to.
        UnsafePathError: it is a link, somebody else's, or writable by others.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = private_folder(path)
        self._lock = Lock(self.path / "LOCK")
        with as_storage_error("opening the folder", self.path):
            self._fd: Descriptor = Descriptor(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))

    def create(self, name: str) -> int:
        """Descriptor of a new file of mode 0600 inside."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)

    def open(self, name: str) -> int:
        """Descriptor of a file inside."""
        return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)

    def manifest(self) -> Manifest | None:
        """What was committed here, `None` if nothing was."""
        path = self.path / MANIFEST
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"the manifest cannot be read: {error.strerror}", where=str(path)) from error
        return unpack(content, path)

    def replace(self, content: bytes) -> None:
        """Make this the manifest, all of it or nothing; readable by its owner only, like everything else in the folder."""
        atomic_write(self.path / MANIFEST, content)
        os.chmod(MANIFEST, 0o600, dir_fd=self._fd)

    def sweep(self, keep: str | None) -> None:
        """Remove what a killed process left: data files that no manifest names, half-written manifests, spilled tensors."""
        for name in os.listdir(self._fd):
            if (_DATA.match(name) and name != keep) or _TEMPORARY.match(name):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._fd)
        sweep(self._fd)

    def close(self) -> None:
        """Let others in. Calling it again does nothing."""
        self._lock.release()


def pack(generation: int, file: str, records: Mapping[str, Record], run: Mapping[str, Json]) -> bytes:
    """The bytes of a manifest for the present versions of `records`.

    Raises:
        ValueError: `run` holds a number that JSON does not have.
    """
    table = {
        name: {
            "dtype": str(record.dtype).removeprefix("torch."),
            "shape": list(record.shape),
            "lead": record.lead,
            "chunk": record.chunk,
            "offsets": list(record.offsets),
            "half": record.whole().half,
            "sums": list(record.whole().sums),
        }
        for name, record in records.items()
    }
    content = {"version": _VERSION, "generation": generation, "file": file, "records": table, "run": dict(run)}
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return b"%08x\n" % zlib.crc32(body) + body


def unpack(content: bytes, path: Path) -> Manifest:
    """Read what `pack` wrote.

    Raises:
        CorruptDataError: it is damaged, or of a later version.
    """
    head, _, body = content.partition(b"\n")
    if head != b"%08x" % zlib.crc32(body):
        raise _corrupt(path, "the manifest is damaged")
    table = strict_json(body, path)
    if table.get("version") != _VERSION:
        raise _corrupt(path, f"manifest of version {table.get('version')!r}")
    try:
        records = {name: _record(name, entry) for name, entry in table["records"].items()}
        manifest = Manifest(int(table["generation"]), str(table["file"]), records, dict(table["run"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _corrupt(path, f"the manifest contradicts itself: {error!r}") from error
    if not _DATA.match(manifest.file) or manifest.generation < 1:
        raise _corrupt(path, f"the manifest names {manifest.file!r} in generation {manifest.generation}")
    return manifest


def _record(name: str, entry: dict[str, Any]) -> Record:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry['dtype']!r} is no dtype")
    shape = tuple(int(size) for size in entry["shape"])
    record = Record(name, dtype, shape, int(entry["lead"]), int(entry["chunk"]), tuple(int(offset) for offset in entry["offsets"]))
    version = Version(int(entry["half"]), tuple(int(value) for value in entry["sums"]))
    if len(version.sums) != record.count or len(record.offsets) != 2 or version.half not in (0, 1):
        raise ValueError(f"{name} has {len(version.sums)} sums for {record.count} chunks")
    record.current = record.committed = version
    return record


def _corrupt(path: Path, what: str) -> CorruptDataError:
    return CorruptDataError(what, where=str(path), fix="Restore the folder from a copy, or use an empty one.")
