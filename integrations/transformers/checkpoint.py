"""Which safetensors file of a folder holds what, from headers only, in transformers' order of preference.

Nothing here needs transformers. `find` answers in one of three ways: a `Checkpoint`, an `UnsupportedModelError` that names the way
out (other formats, quantised weights, code of the checkpoint's own), or a `StorageError` (a shard is missing, or the index points out
of the folder).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from torchwrap.core.errors import CorruptDataError, StorageError, UnsafePathError, UnsupportedModelError

__all__ = ["Checkpoint", "Entry", "find", "read_config"]

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip

_SAVE_AGAIN = "model.save_pretrained('{new}'), which writes safetensors, and open that folder."


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its file, its key in it, and what the header says about it (`dtype` is None for kinds torch lacks)."""

    file: Path
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor; four per element for kinds torch lacks."""
        return torch.Size(self.shape).numel() * (self.dtype.itemsize if self.dtype else 4)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All stored tensors of a folder by key, and its parsed config.json."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, or None if there is none that names a transformers model."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("model_type"), str) else None


def find(folder: Path) -> Checkpoint:
    """Read the headers of the safetensors files that transformers would load from `folder`.

    Raises:
        UnsupportedModelError: no config, quantised weights, adapter or custom code, or no safetensors; says what to do instead.
        StorageError: a shard of the index is missing.
        UnsafePathError: the index or the config names a file outside the folder.
        CorruptDataError: an index or a header that cannot be read.

    Cost: headers only; no weight is read.
    """
    config = read_config(folder)
    if config is None:
        raise UnsupportedModelError("no config.json with a model_type", where=str(folder), fix="Give the folder of a saved model.")
    _refuse(folder, config)
    entries: dict[str, Entry] = {}
    for file in _files(folder, config):
        entries.update(_read_header(file))
    return Checkpoint(folder, config, entries)


def _refuse(folder: Path, config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"the checkpoint is quantised (quant_method={method!r}); its tensors are not the model's parameters",
            where=str(folder / CONFIG),
            fix="Load it with from_pretrained, call model.dequantize() where the method offers it, then " + _SAVE_AGAIN.format(new="plain"),
        )
    if config.get("auto_map"):
        raise UnsupportedModelError(
            "the checkpoint brings its own model code (auto_map), which this library does not run",
            where=str(folder / CONFIG),
            fix="Load it yourself with trust_remote_code=True and wrap the model object.",
        )
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            "the folder holds an adapter, not a whole model",
            where=str(folder),
            fix="Load base model and adapter, merge_and_unload(), then " + _SAVE_AGAIN.format(new="merged"),
        )


def _files(folder: Path, config: dict[str, Any]) -> list[Path]:
    chosen = config.get("transformers_weights")  # a config may name its weight file; it overrides the usual names
    if chosen is not None:
        path = _inside(folder, chosen, folder / CONFIG)
        return _shards(folder, path) if path.name.endswith(".index.json") else [_present(path, folder / CONFIG)]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder, folder / INDEX)
    others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth", "*.safetensors") for path in folder.glob(pattern))
    options = "gguf_file='...' (then model.dequantize() is not needed), " if any(name.endswith(".gguf") for name in others) else ""
    raise UnsupportedModelError(
        f"neither {SINGLE} nor {INDEX}; found {', '.join(others[:6]) or 'no weight file'}",
        where=str(folder),
        fix=f"Load it once with from_pretrained({options}dtype='auto') and " + _SAVE_AGAIN.format(new="converted")
        if others
        else "Save the weights with model.save_pretrained(folder).",
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        unique = sorted(set(names))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptDataError(f"the index cannot be read: {error}", where=str(index), fix="Fetch the checkpoint again.") from error
    return [_present(_inside(folder, name, index), index) for name in unique]


def _inside(folder: Path, name: object, source: Path) -> Path:
    path = Path(str(name))
    # Shards may be links into a download cache, so the name is judged, not where the link leads.
    if not isinstance(name, str) or path.is_absolute() or ".." in path.parts:
        raise UnsafePathError(f"file name {name!r} leaves the folder", where=str(source), fix="Do not use this checkpoint.")
    return folder / path


def _present(path: Path, source: Path) -> Path:
    if not path.is_file():
        raise StorageError(f"missing shard {path.name}", where=str(source), fix=f"Put the file at {path}, or fetch the checkpoint again.")
    return path


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as handle:
            entries = {}
            for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
                part = handle.get_slice(key)
                entries[key] = Entry(file, key, DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
            return entries
    except (SafetensorError, OSError) as error:
        raise CorruptDataError(f"not a readable safetensors file: {error}", where=str(file), fix="Fetch the file again.") from error
