"""What `describe` and `verify` both read from a checkpoint folder: its config, its plan, its safetensors headers.

Everything here looks at headers only; no weight is read and no framework is imported. A file that cannot be understood becomes a finding
in the result, so that one broken shard does not hide the state of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchwrap.storage.safefile import Segment

__all__ = ["Checkpoint", "Tensor", "read_checkpoint"]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as a header declares it."""

    name: str
    file: str
    segment: Segment


@dataclass(kw_only=True)
class Checkpoint:
    """A checkpoint folder as far as its headers tell.

    Args:
        folder: the folder.
        config: content of config.json, empty if there is none.
        plan: content of torchwrap.json, `None` if there is none.
        files: bytes of each safetensors file.
        tensors: every tensor of every readable file.
        declared: tensor name to file name, as the index says; empty without an index.
        findings: what is wrong, one sentence each.
    """

    folder: Path
    config: dict[str, object] = field(default_factory=dict)
    plan: dict[str, object] | None = None
    files: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    declared: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.segment.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.segment.nbytes // tensor.segment.dtype.itemsize for tensor in self.tensors.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read every header of a checkpoint folder.

    Args:
        folder: a folder with safetensors files.

    Returns:
        What was found; problems are in `findings`, nothing is raised for a damaged file.
    """
    from torchwrap.core.errors import TorchwrapError
    from torchwrap.storage.safefile import TensorFile, index_folder

    found = Checkpoint(folder=folder)
    found.config = _json(folder / "config.json", found.findings) or {}
    found.plan = _json(folder / "torchwrap.json", found.findings)
    index = _json(folder / _INDEX, found.findings)
    if index is not None:
        found.declared = _weight_map(index, found.findings)
    for path in _files(found):
        try:
            file = TensorFile.open(path)
        except (TorchwrapError, OSError) as error:
            found.findings.append(str(error))
            continue
        found.files[path.name] = path.stat().st_size
        for name, segment in file.segments.items():
            if name in found.tensors and found.declared.get(name) != path.name:
                continue  # the index decides which file a doubled name is read from
            found.tensors[name] = Tensor(name, path.name, segment)
        file.close()
    if not found.findings:
        try:
            index_folder(folder)
        except TorchwrapError as error:
            found.findings.append(str(error))
    found.findings += _index_findings(found)
    return found


def _files(found: Checkpoint) -> Iterator[Path]:
    if found.declared:
        for name in sorted(set(found.declared.values())):
            if Path(name).name != name:
                found.findings.append(f"{_INDEX} names {name!r}, which is not a file name in this folder")
            elif not (found.folder / name).is_file():
                found.findings.append(f"shard {name} is missing; {_INDEX} puts {_count(found.declared, name)} tensors into it")
            else:
                yield found.folder / name
        return
    whole = found.folder / "model.safetensors"
    paths = [whole] if whole.is_file() else sorted(found.folder.glob("*.safetensors"))
    if not paths:
        found.findings.append(f"no safetensors file in {found.folder}")
    yield from paths


def _count(declared: dict[str, str], file: str) -> int:
    return sum(1 for name in declared.values() if name == file)


def _index_findings(found: Checkpoint) -> list[str]:
    if not found.declared:
        return []
    absent = [name for name, file in found.declared.items() if file in found.files and found.tensors.get(name, None) is None]
    unlisted = [name for name in found.tensors if name not in found.declared]
    findings = [f"tensor {name} is missing from {found.declared[name]}, where {_INDEX} puts it" for name in absent]
    return findings + [f"tensor {name} lies in {found.tensors[name].file} but {_INDEX} does not list it" for name in unlisted]


def _weight_map(index: dict[str, object], findings: list[str]) -> dict[str, str]:
    mapping = index.get("weight_map")
    if isinstance(mapping, dict) and all(isinstance(file, str) for file in mapping.values()):
        return dict(mapping)
    findings.append(f"{_INDEX} has no weight_map from tensor names to file names")
    return {}


def _json(path: Path, findings: list[str]) -> dict[str, object] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        findings.append(f"{path.name} cannot be read: {error}")
        return None
    if not isinstance(content, dict):
        findings.append(f"{path.name} holds {type(content).__name__}, an object was expected")
        return None
    return content
