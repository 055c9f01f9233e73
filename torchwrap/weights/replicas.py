"""Keeping replicas in other processes from being made of weights that are not there.

`DistributedDataParallel` begins by copying the weights of process 0 into those of all others. A weight that is away has one element to
write to, and torch fails with words about memory. So a model put into a replica is looked at first, with torch's own hook for modules that
become part of others, as long as the model is wrapped. Without that copying (`init_sync=False`) replicas work: gradients are averaged
in memory, before the optimizer uses them.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from torchwrap.core import errors

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["watch_replicas"]


_watched: weakref.WeakSet[WeightsHandle] = weakref.WeakSet()


def watch_replicas(handle: WeightsHandle) -> None:
    """Refuse replicas that would write to the handle's absent weights, as long as it lives and has such."""
    _hook()
    _watched.add(handle)


# Once in a process, and left there: torch walks the table of these hooks whenever a module is built, perhaps in another thread just now.
@cache
def _hook() -> RemovableHandle:
    return register_module_module_registration_hook(_look)


def _look(outer: nn.Module, name: str, inner: nn.Module | None) -> None:
    if not isinstance(outer, DistributedDataParallel) or inner is None or not _is_copying():
        return
    handles = list(_watched)
    for fqn, parameter in inner.named_parameters():
        for handle in handles if fqn not in outer.parameters_to_ignore else ():
            piece = handle.piece_of(parameter)
            if piece is not None and not piece.resident:
                raise _refusal(handle.config.technique, fqn)


def _refusal(technique: str, fqn: str) -> errors.ConflictError:
    return errors.ConflictError(
        f"{technique}: DistributedDataParallel would copy the weights of process 0 over those of the others, and they are away",
        where=fqn,
        fix=f"DistributedDataParallel(model) first, then torchwrap.{technique}(model), then the optimizer. Or, if all processes have "
        "loaded the same weights: DistributedDataParallel(model, init_sync=False).",
    )


def _is_copying() -> bool:
    """Whether a replica is being made, and told to copy weights (torch 2.13 keeps no note of that on the module)."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not DistributedDataParallel.__init__.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and bool(frame.f_locals.get("init_sync", True))
