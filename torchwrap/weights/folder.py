"""From a checkpoint folder to an offloaded model, without the weights ever being in memory together.

An integration builds the model with its parameters on `meta` and says in which safetensors file each of them lies. Parameters become
placeholders with a known home; `attach` then reads the resident ones and streams the rest from where they are.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.integration import Skeleton, integration_for_folder
from torchwrap.core.tensors import map_parameters, placeholder
from torchwrap.core.transaction import apply
from torchwrap.storage.folder import OwnFolder
from torchwrap.storage.safefile import TensorFile
from torchwrap.stream.settings import Streaming
from torchwrap.stream.units import Home

SOURCES = "_torchwrap_sources"
"""Key in the `__dict__` of a model built from a folder: {parameter name: Home}. `attach` takes it away."""

__all__ = ["SOURCES", "WorkFolder", "as_placeholders", "open_folder"]


@torch.inference_mode(False)  # parameters made in inference mode could never be used outside it
def open_folder(folder: Path, config: Streaming, dtype: torch.dtype | None) -> nn.Module:
    """See `OffloadTechnique.from_pretrained`."""
    integration = integration_for_folder(folder)
    work = WorkFolder(config)
    keep_work = False
    try:
        model, homes = as_placeholders(integration.skeleton(folder, work, dtype=dtype), folder)
        for home in homes.values():
            home.converted = work.holds(home.file.path)
        apply(model, config)
        keep_work = any(home.converted for home in homes.values())
        if keep_work:
            weakref.finalize(model, work.close)
            work.warn_of_memory()
        return model
    finally:
        if not keep_work:
            work.close()


class WorkFolder(os.PathLike[str]):
    """A private folder for converted weights; the caller closes it. After a kill the next one made beside it sweeps.

    One among the system's temporary files is made when its name is asked for: most checkpoints need none, and no place for it.

    Raises:
        StorageError, UnsafePathError: there can be none; at once, if `path` says where.
    """

    def __init__(self, config: Streaming) -> None:
        self._made: OwnFolder | None = OwnFolder(Path(config.path)) if config.path is not None else None

    def __fspath__(self) -> str:
        if self._made is None:
            self._made = OwnFolder(None)
        return str(self._made.path)

    def holds(self, path: Path) -> bool:
        """Whether a file lies in it."""
        return self._made is not None and self._made.path in path.parents

    def warn_of_memory(self) -> None:
        """See `OwnFolder.warn_of_memory`."""
        if self._made is not None:
            self._made.warn_of_memory()

    def close(self) -> None:
        """Remove it with all files."""
        if self._made is not None:
            self._made.close(keep=False)


def as_placeholders(skeleton: Skeleton, folder: Path) -> tuple[nn.Module, dict[str, Home]]:
    """The skeleton's model with placeholders for parameters, in eval mode, and where each of them is stored."""
    homes = _homes(skeleton)
    model = skeleton.model.eval()
    _show_placeholders(model, homes, folder)
    model.__dict__[SOURCES] = homes
    return model, homes


def _homes(skeleton: Skeleton) -> dict[str, Home]:
    files: dict[Path, TensorFile] = {}
    homes: dict[str, Home] = {}
    for name, (path, key) in skeleton.weights.items():
        file = files.get(path)
        if file is None:
            file = files[path] = TensorFile.open(path)
        segment = file.segments.get(key)
        if segment is None:
            raise errors.CorruptDataError(
                f"{key!r} is not in this file, although the index says so", where=str(path), fix="Restore the checkpoint."
            )
        homes[name] = Home(file, key, segment.offset, segment.nbytes)
    return homes


def _show_placeholders(model: nn.Module, homes: dict[str, Home], folder: Path) -> None:
    """Replace meta parameters by placeholders and fill persistent buffers."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def replace(name: str, parameter: nn.Parameter) -> nn.Parameter:
        home = next((homes[other] for other in names[id(parameter)] if other in homes), None)
        if home is None:
            raise errors.UnsupportedModelError(f"the folder has no weights for {name}", where=str(folder), fix="Complete the checkpoint.")
        segment = home.file.segments[home.name]
        if segment.shape != tuple(parameter.shape) or segment.dtype != parameter.dtype:
            raise errors.CorruptDataError(
                f"{name} is {tuple(parameter.shape)} {parameter.dtype} in the model and {segment.shape} {segment.dtype} in the file",
                where=str(home.file.path),
                fix="Restore the checkpoint, or pass dtype=.",
            )
        return nn.Parameter(placeholder(parameter.shape, parameter.dtype, "cpu"), requires_grad=parameter.requires_grad)

    map_parameters(model, replace)
    for name, _ in model.named_buffers():
        if name in homes:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = homes[name].file.view(homes[name].name).clone()
