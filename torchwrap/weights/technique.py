"""What every technique that streams weights does alike: carry out a blueprint, undo it, and open a folder.

`attach` stores what has to leave and only then hides it; `detach` brings everything back. From a folder the same happens without the
weights ever having been in memory: see folder.py. A technique adds its settings and `prepare`, which divides the model and the budget.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from torchwrap.activations.layers import ActivationLayer, RecomputeLayer
from torchwrap.core import errors
from torchwrap.core.technique import Handle, Place, Prepared, Technique
from torchwrap.storage import aio
from torchwrap.storage.heap import give_back
from torchwrap.storage.limits import memory_available
from torchwrap.stream.arena import arena_for
from torchwrap.stream.engine import Engine
from torchwrap.stream.settings import Streaming
from torchwrap.stream.tiles import parts
from torchwrap.stream.timeline import timeline_of
from torchwrap.stream.units import Unit
from torchwrap.weights.blueprint import Blueprint, Working
from torchwrap.weights.budget import check_room, process_bytes
from torchwrap.weights.folder import SOURCES, open_folder
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.place import Placed, place, take_back
from torchwrap.weights.state import hook_states, unhook_states
from torchwrap.weights.stepping import warn_of_mixture

__all__ = ["StreamingTechnique", "activation_layers"]

S = TypeVar("S", bound=Streaming)

_THREADS, _CHUNK = 4, 4 << 20  # measured: two or three requests keep the disk busy, the rest cover the time spent on checksums


class StreamingTechnique(Technique[S], Generic[S]):
    """Streams weights from disk or host memory while the model runs.

    Attributes:
        handle_class: what a model gets; its constructor is that of `WeightsHandle`.
    """

    exactness = "bit-identical"
    handle_class: ClassVar[type[WeightsHandle]] = WeightsHandle

    @torch.inference_mode(False)
    @torch.no_grad()
    def attach(self, model: nn.Module, prepared: Prepared[S]) -> Handle:
        """Store what has to leave, then hide it; an error leaves the model as it was."""
        blueprint: Blueprint = prepared.data
        config, plan, device = prepared.config, blueprint.plan, blueprint.device
        reader = aio.Reader(
            config.io_threads or _THREADS,
            int(config.io_chunk) or _CHUNK,
            config.io_timeout_s,
            mode=config.io_backend,
        )
        pieces = blueprint.division.pieces
        for piece in {id(p): p for p in [*pieces, *parts(pieces)]}.values():
            piece.resident = piece.index in plan.resident or piece in blueprint.division.fixed
        placed: Placed | None = None
        try:
            placed = place(model, config, blueprint, reader)
            arena = arena_for(device)
            engine = None
            if any(not piece.resident for piece in pieces):
                engine = Engine(
                    blueprint.division.units,
                    plan,
                    arena,
                    reader,
                    verify=config.verify != "header",
                    timeout_s=config.io_timeout_s,
                    timeline=timeline_of(config, plan),
                )
                engine.route(blueprint.groups)
            handle = self.handle_class(
                config,
                blueprint.division.units,
                pieces,
                plan,
                engine,
                reader,
                store=placed.store,
                device=device,
                origin=blueprint.origin,
                baseline_bytes=0,
                activation=Working(blueprint.integration, model, blueprint.copies, blueprint.rehearsal, blueprint.trial),
                mapped=blueprint.homes is not None,
                notes=prepared.notes,
            )
            if placed.locked is not None:
                handle.on_close = weakref.finalize(handle, arena.release_host, placed.locked)
            for _, _, layer in prepared.layers:
                layer.owner = handle
            handle.hooked = hook_states(model, handle)
            handle.root = weakref.ref(model)
        except BaseException:
            unhook_states(model.modules())
            if placed is not None:
                placed.undo()
            reader.close()
            raise
        placed.keep()
        for unit in blueprint.division.units:
            unit.module = None  # layers know their modules; the handle must not keep parts of a model alive that the user replaces
        model.__dict__.pop(SOURCES, None)
        give_back()
        handle.baseline_bytes = process_bytes()  # only now: what has left is no part of it
        return handle

    @torch.inference_mode(False)
    @torch.no_grad()
    def detach(self, model: nn.Module, handle: Handle) -> None:
        """Bring all weights back and remove what was stored.

        Raises:
            BudgetError: there is not enough memory for them; nothing is changed then.

        Warns if an optimizer has updated some of them, and others not yet.
        """
        assert isinstance(handle, WeightsHandle)
        if not handle.mapped:
            needed = sum(piece.nbytes for piece in handle.pieces if not piece.resident)
            check_room(needed, memory_available() if handle.device.type == "cpu" else None, "unwrapping")
        handle.backward.settle()
        if handle.stepping:
            # From here through two decorators of torch, _take_off and unwrap to whoever called that.
            warn_of_mixture("unwrap()", "Call step() of the optimizer to finish it, or load a checkpoint.", stacklevel=6)
        with handle.engine.exclusive() if handle.engine is not None else nullcontext():
            take_back(handle)
            unhook_states([*model.modules(), *handle.hooked])
            handle.close()

    def from_pretrained(
        self, folder: str | os.PathLike[str], config: S | None = None, *, dtype: torch.dtype | None = None, **options: Any
    ) -> nn.Module:
        """The model stored in a folder, its weights streamed, without ever having all of them in memory.

        Args:
            folder: a checkpoint with safetensors files that an installed integration can build.
            config: the technique's settings, or their fields as keywords.
            dtype: of the weights; None is what the folder says. Another one is written once to `path`.

        Raises:
            ConfigError: `folder` is no path.
            UnsupportedModelError: no integration can build the model, or weights are missing.
            CorruptDataError: a file breaks a rule of its format.
            BudgetError: the budget is below what one unit needs.

        Cost: headers and resident weights are read; nothing is written unless the checkpoint has to be converted.
        """
        try:
            path = Path(folder)
        except TypeError as error:
            raise errors.ConfigError(
                f"{self.name}: an object of class {type(folder).__name__} is no path",
                where="folder",
                fix=f"Name the folder of a checkpoint. A model that is there already: {self.name}(model).",
            ) from error
        return open_folder(path, self._settings(config, options), dtype)


def activation_layers(config: Streaming, units: Iterable[Unit]) -> list[Place]:
    """Layers around blocks for what is to become of their activations; to be put on before the units' own, which then are inside."""
    if config.activations == "keep":
        return []
    layer = ActivationLayer if config.activations in ("host", "disk") else RecomputeLayer
    blocks = [unit for unit in units if unit.kind == "block" and unit.parent is None]
    return [(unit.name, unit.module, layer(None, unit.index)) for unit in reversed(blocks) if unit.module is not None]
