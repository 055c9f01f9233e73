"""Settings that every technique shares that streams weights: how much memory they may take, where they may lie, how they are read."""

from __future__ import annotations

import functools
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from torchwrap.core import errors
from torchwrap.core.config import Config, option
from torchwrap.core.example import described

__all__ = ["CRC", "Streaming", "load_compiler", "state_bytes"]

CRC: dict[str, Literal["never", "once", "always"]] = {"header": "never", "first": "once", "always": "always"}
"""When the CRC-32 of what we stored is compared, by `Streaming.verify`."""

_MASTER = "master_weights"


@functools.cache
def state_bytes(optimizer: int | str, dtype: torch.dtype) -> int:
    """Bytes that an optimizer keeps for each element of a weight of this type: found by letting it make a step on one of 64 elements.

    Args:
        optimizer: as the setting `optimizer`.

    Raises:
        ConfigError: that is no class of `torch.optim`, or one that needs more than gradients and usual settings; or negative.
    """
    found = _class_of(optimizer)
    if isinstance(found, int):
        load_compiler()  # as the step below does: before memory is counted
        return found
    assert isinstance(optimizer, str)
    low = optimizer.startswith(_MASTER) and dtype in (torch.bfloat16, torch.float16)
    weight = torch.zeros(64, dtype=torch.float32 if low else dtype, requires_grad=dtype.is_floating_point or dtype.is_complex)
    weight.grad = torch.zeros_like(weight)
    with suppress(Exception):  # whatever such a class raises
        made = found([weight])  # type: ignore[call-arg]
        made.step()
        kept = [value for value in made.state[weight].values() if isinstance(value, torch.Tensor) and value.shape == weight.shape]
        return sum(value.element_size() for value in kept) + (torch.float32.itemsize if low else 0)
    raise _unplanned(optimizer)


def load_compiler() -> None:
    """Load what the first optimizer of a process makes torch load (measured: 76 MiB)."""
    if "torch._dynamo" not in sys.modules:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])


def _class_of(optimizer: int | str) -> int | type[torch.optim.Optimizer]:
    """The class that the setting names, or the bytes; it is not tried, for torch loads its compiler when an optimizer first steps."""
    if isinstance(optimizer, int):
        if optimizer < 0:
            raise errors.ConfigError(f"{optimizer} bytes of state for an element", where="optimizer", fix="Use 0 or more.")
        return optimizer
    master = optimizer.startswith(f"{_MASTER}(") and optimizer.endswith(")")
    cls = getattr(torch.optim, optimizer[len(_MASTER) + 1 : -1] if master else optimizer, None)
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        return cls
    raise _unplanned(optimizer)


def _unplanned(optimizer: int | str) -> errors.ConfigError:
    return errors.ConfigError(
        f"{optimizer!r} is no optimizer that training can be planned for",
        where="optimizer",
        fix=f'Use a class of torch.optim ("AdamW", "SGD"), "{_MASTER}(AdamW)", or the bytes it keeps for each element of a weight.',
    )


@dataclass(frozen=True, kw_only=True)
class Streaming(Config):
    """What the engine, the files and the budget go by; a technique's own settings derive from it.

    Sizes are bytes, or strings such as "1GiB". They bound the model's *weights*: those that stay and the buffers for those that come
    and go. Whatever is given, no more is taken than the machine or its memory control group leaves after `reserve`.
    """

    device: str | None = option(
        None, doc="Device that computes; None: the device the model is on, or CUDA for a folder when there is one.", machine=True
    )
    device_memory: int | str | None = option(
        None, doc="Weights that may be present where the model computes; None: what is free after `reserve`.", unit="bytes", size=True
    )
    host_memory: int | str | None = option(
        None,
        doc="Weights that may be kept in host memory for a separate device; on a CPU-only machine the same memory as device_memory.",
        unit="bytes",
        size=True,
    )
    path: str | None = option(
        None, doc="Folder for weights that have no safetensors file of their own; None: a private temporary folder.", machine=True
    )
    units: tuple[str, ...] = option((), doc="Names or class names of the modules streamed as one unit; (): the repeated blocks.")
    pin: tuple[str, ...] = option((), doc="Names of modules or parameters that never leave.")
    reserve: int | str | None = option(
        None, doc="Memory left to activations and caches; None: estimated from the model.", unit="bytes", size=True
    )
    example: object = option(
        None,
        doc="What the model is called with, if memory is to be planned by that: a tensor, a tuple, or a mapping of keywords, of which "
        "shapes and types count; or that as text. None: what the integration knows, by sequences and tokens.",
    )
    activations: Literal["keep", "recompute", "host", "disk", "auto"] | None = option(
        None,
        doc="What a block's backward needs besides weights: keep it; recompute it; move it to host memory (beside a separate device) or "
        "disk and back; auto measures the first step and chooses for each block. None: auto if the goal is training, else keep.",
        choices=(None, "keep", "recompute", "host", "disk", "auto"),
    )
    activation_memory: int | str | None = option(
        None,
        doc='Activations of blocks that may be present at once with activations="auto"; None: `reserve` and what weights leave of '
        "`device_memory`, or most of what is free if neither is given.",
        unit="bytes",
        size=True,
    )
    optimizer: int | str = option(
        "AdamW",
        doc='What training is planned for until there is an OffloadedOptimizer: a class of torch.optim by name, or "master_weights(NAME)", '
        "with usual settings; or the bytes that an optimizer keeps for each element of a weight.",
    )
    io_backend: Literal["auto", "direct", "buffered", "uring"] = option(
        "auto",
        doc="Reads past the page cache, or through it; auto: past it where the file system allows; uring: as auto, with io_uring and one "
        "thread instead of several.",
        choices=("auto", "direct", "buffered", "uring"),
    )
    io_threads: int = option(0, doc="Reading threads, or reads under way at once by io_uring; 0 chooses.", low=0, high=64, machine=True)
    io_chunk: int | str = option(0, doc="Bytes per read request; 0 chooses.", unit="bytes", size=True, machine=True)
    verify: Literal["first", "always", "header"] = option(
        "first",
        doc="first: every read is compared with the sum of the first read, or the stored one; always: also CRC-32; header: file identity.",
        choices=("first", "always", "header"),
    )
    io_timeout_s: float = option(
        60.0, doc="Time after which a read that does not finish is an error.", unit="seconds", low=0.001, high=86400.0
    )
    record: bool = option(False, doc="Record a timeline of reads, computation, updates and stalls for pictures.")
    keep: bool = option(False, doc="Keep the files in `path` after unwrap.")

    def validate(self) -> None:
        """Rules that concern more than one field."""
        name = self.technique
        _class_of(self.optimizer)
        if self.example is not None:
            object.__setattr__(self, "example", described(self.example))
        if self.activations is None:
            object.__setattr__(self, "activations", "keep")
        if 0 < int(self.io_chunk) < 4096:
            raise errors.ConfigError(f"{name}: requests of {self.io_chunk} bytes", where="io_chunk", fix="Use 0, or 4096 bytes and more.")
        if self.activation_memory is not None and self.activations != "auto":
            raise errors.ConfigError(
                f'{name}: activation_memory bounds what activations="auto" chooses, not "{self.activations}"',
                where="activation_memory",
                fix='Leave it out, or use activations="auto".',
            )
        if self.path is not None:
            object.__setattr__(self, "path", os.path.expanduser(self.path))
        if self.path is not None and ("\0" in self.path or not self.path):
            raise errors.ConfigError(f"{name}: {self.path!r} is no path", where="path", fix="Name a folder.")
        if self.keep and self.path is None:
            raise errors.ConfigError(f"{name}: keep=True needs a folder to keep", where="keep", fix='Give path="/some/folder".')
