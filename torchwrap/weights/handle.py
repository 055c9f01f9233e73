"""The live object of a technique that streams weights: figures, and the model's weights while they are away.

`tw.handle_of(model, name)` returns it. It owns the engine, the files and the tables, lends values to `core.tensors`, serves
`state_dict` and `load_state_dict`, and answers when the model is moved, copied or pickled.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchwrap.activations.modes import Activations
from torchwrap.core import errors
from torchwrap.core.swap import original_class
from torchwrap.core.tensors import bind, data_of, is_placeholder
from torchwrap.storage import aio
from torchwrap.storage.checksum import memory_of, sum64
from torchwrap.storage.spill import SpillStore
from torchwrap.storage.views import Views
from torchwrap.storage.workers import mismatch
from torchwrap.stream.backward import Backward
from torchwrap.stream.engine import Engine
from torchwrap.stream.pieces import drop_home, part_of, put_away, read_piece
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.rows import RowTable
from torchwrap.stream.settings import CRC, Streaming
from torchwrap.stream.tiles import known_sum, share
from torchwrap.stream.timeline import Event, Timeline, timeline_of
from torchwrap.stream.units import Crc, Piece, Unit
from torchwrap.weights import copying
from torchwrap.weights.budget import RESERVE_TOKENS, count_libraries
from torchwrap.weights.handed import Handed
from torchwrap.weights.replicas import watch_replicas
from torchwrap.weights.stepping import watch_steps
from torchwrap.weights.timing import TimedPasses
from torchwrap.weights.training import StepToCome, TrainingPrediction, predict_step
from torchwrap.weights.trial import inputs_of

if TYPE_CHECKING:
    from torchwrap.optimizer.optimizer import OffloadedOptimizer
    from torchwrap.weights.blueprint import Working

__all__ = ["WeightsHandle"]


class WeightsHandle(TimedPasses):
    """Weights of one model that are not all in memory.

    Attributes:
        config: the settings of the technique this is the handle of.
        pieces: all distinct parameters of the model.
        plan: how the budget was divided.
        engine: streams the units; None when everything is resident.
        backward: the backward running through the model; tells listeners which units it is done with.
        timeline: recorded events and samples, if the config has `record=True`.
        activations: what becomes of what blocks save for the backward.
        tables: row tables by unit index.
        passes: completed forward passes through the root.
        unwatched: values of the model's `training` in which no whole forward was watched for reads of absent weights.
        handed: what state dicts show weights with that are away.
        stepping: whoever has updated some weights and not yet others; calls of the model are refused meanwhile.
        keeps_casts: all streamed blocks together are no larger than the slots (one block used again and again), so that autocast may
            keep its copies of them.
    """

    def __init__(
        self,
        config: Streaming,
        units: list[Unit],
        pieces: list[Piece],
        plan: ResidencyPlan,
        engine: Engine | None,
        reader: aio.Reader,
        *,
        store: SpillStore | None,
        device: torch.device,
        origin: torch.device,
        baseline_bytes: int,
        activation: Working,
        mapped: bool,
        notes: Sequence[str] = (),
    ) -> None:
        self.config: Streaming = config
        self.units: list[Unit] = units
        self.pieces: list[Piece] = pieces
        self.plan: ResidencyPlan = plan
        self.engine: Engine | None = engine
        self.backward: Backward = Backward(engine)
        self.reader: aio.Reader = reader
        self.store: SpillStore | None = store
        self.device: torch.device = device
        self.baseline_bytes: int = baseline_bytes
        self.activation: Working = activation
        self.origin: torch.device = origin  # where the weights go when the model is unwrapped
        self.mapped: bool = mapped  # built from a folder: after unwrap, weights show the folder's files, as a framework's own loading would
        self.notes: list[str] = list(notes)
        self.hooked: list[nn.Module] = []  # modules with our state hooks, also those the user took out of the model since
        self.is_inert: bool = False
        self.on_close: Callable[[], object] = _nothing
        self.timeline: Timeline | None = engine.timeline if engine is not None else timeline_of(config, plan)
        self.activations: Activations = self._activations()
        self.optimizer: Callable[[], OffloadedOptimizer | None] = _nothing  # a weak reference, once there is one
        self.stepping: set[object] = set()
        self.passes: int = 0
        streams = any(not piece.resident for piece in pieces)
        self.unwatched: set[bool] = {True, False} if streams else set()
        self._end_watch: Callable[[], object] = watch_steps(self) if streams else _nothing
        if streams:
            watch_replicas(self)
        blocks = {p.index: p.nbytes for unit in units if unit.kind in ("block", "expert") for p in unit.pieces if not p.resident}
        self.keeps_casts: bool = sum(blocks.values()) <= plan.slots * plan.slot_bytes
        self._own_lock = threading.RLock()
        self.time_passes()
        self._by_id = {id(piece.parameter): piece for piece in pieces}
        self.handed: Handed = Handed()
        self.lent: dict[int, Piece] = {}  # shown in full while load_state_dict copies into them
        self.tables: dict[int, RowTable] = {
            unit.index: RowTable(unit.pieces[0], reader, verify=config.verify != "header", timeout_s=config.io_timeout_s)
            for unit in units
            if unit.kind == "rows" and unit.pieces and not unit.pieces[0].resident
        }

    # -- figures -----------------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Counters since wrapping. Bytes, seconds and counts, by name."""
        counters = dict(self.engine.counters) if self.engine is not None else {}
        read = int(counters.get("bytes_read", 0)) + sum(table.bytes_read for table in self.tables.values())
        reading_s = self.reader.stats.busy_s
        return {
            "passes": self.passes,
            "bytes_read": read,
            "stall_s": float(counters.get("stall_s", 0.0)),
            "stalls": int(counters.get("stalls", 0)),
            "unit_uses": int(counters.get("unit_uses", 0)),
            "unit_hits": int(counters.get("unit_hits", 0)),
            "schedule_miss": self.engine.schedule.misses if self.engine is not None else 0,
            "bandwidth": self.reader.stats.bytes / reading_s if reading_s else 0.0,
            "resident_bytes": self.plan.fixed_bytes + self.plan.resident_bytes,
            "slot_bytes": self.plan.slots * self.plan.slot_bytes,
            "held_bytes": self.plan.held_bytes,
            "streamed_bytes": self.plan.streamed_bytes,
            "table_bytes": self.plan.table_bytes,
            "disk_bytes": sum(p.nbytes for p in self.pieces if not p.resident and p.home is not None),
            "host_bytes": sum(p.nbytes for p in self.pieces if not p.resident and p.host is not None),
            "total_bytes": sum(p.nbytes for p in self.pieces),
            **{name: int(value) for name, value in counters.items() if name.startswith("expert_")},
            **self.activations.stats(),
        }

    def tiers(self) -> dict[str, int]:
        """Bytes of weights by the tier that is their home; slots count where they compute."""
        figures = self.stats()
        return {"device": self.plan.held_bytes, "host": int(figures["host_bytes"]), "disk": int(figures["disk_bytes"])}

    def bytes_moved(self) -> int:
        """Bytes of weights fetched in a pass that uses every unit once, rows of tables not counted."""
        return self.plan.streamed_bytes

    def predict_training(self, *, batch: int | None = None, tokens: int | None = None, example: object = None) -> TrainingPrediction:
        """What a training step will take, with the model's `OffloadedOptimizer`, or with an Adam as long as there is none.

        Args:
            batch: sequences (or images) per step; None: one, or as many as the example has.
            tokens: tokens per sequence; None: 128. Not beside an example.
            example: what the model is called with, as in the settings; None: the one in the settings.

        Exactness: peak bytes within 10 % on the benchmarks of docs/figures.md. What blocks save is counted on a forward without memory if
            training was the goal when the model was wrapped and its integration knows its inputs; else the shapes of weights tell, without
            what attention keeps for each pair of tokens where its kernel is not fused. With "auto" the first step recomputes. Checkpointing
            by the model itself is seen, by others not. Seconds are simulated from the bandwidth seen so far and the last step that was
            measured, whatever `batch` and `tokens` are; before that, they are those of moving bytes alone.

        Raises:
            ConfigError: an argument is no integer of at least 1, or an example that the model cannot be called with.
        """
        batch, tokens, called = inputs_of(self.config, batch, tokens, example)
        count_libraries(self)
        return predict_step(self, batch=batch, tokens=tokens, example=called)

    @property
    def events(self) -> list[Event]:
        """The timeline's events; empty without `record=True`."""
        return self.timeline.events if self.timeline is not None else []

    def trim(self) -> None:
        """Free slots and scratch memory until the next forward."""
        with self.lock:
            if self.engine is not None:
                self.engine.trim()
            for table in self.tables.values():
                table.free()

    @property
    def driven(self) -> bool:
        """Whether an `OffloadedOptimizer` that is not closed updates weights of this model."""
        return bool(self.backward.listeners)

    # -- values ------------------------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> threading.RLock:
        """Held by the thread that runs the model."""
        return self.engine.lock if self.engine is not None else self._own_lock

    def piece_of(self, parameter: torch.Tensor | None) -> Piece | None:
        """The piece behind a parameter object, if it is one of this model's."""
        return self._by_id.get(id(parameter)) if parameter is not None else None

    def value(self, piece: Piece) -> torch.Tensor:
        """The piece's real values on the execution device: what the parameter shows, or a private copy read from its home."""
        shown = data_of(piece.parameter)
        if not is_placeholder(shown) and (piece.resident or self.engine is None):
            return shown
        if self.engine is not None:  # not under `lock`: a device's backward asks from a thread of its own, perhaps within a forward
            return self.engine.read(piece).to(self.device)
        return read_piece(piece, self.reader, self.config.io_timeout_s, verify=self.config.verify != "header").to(self.device)

    def unchanging(self, piece: Piece) -> AbstractContextManager[None]:
        """Within the block nothing replaces the piece's values."""
        return self.engine.unchanging(piece) if self.engine is not None else nullcontext()

    @torch.inference_mode(False)
    def stored_view(self, piece: Piece, views: Views | None = None) -> torch.Tensor:
        """The piece's values as a tensor over its home, compared with its sum if that is known. Cost: one read, no memory of its own.

        Args:
            piece: of this model.
            views: gets the tensor, which shows later values as well then.
        """
        if piece.host is not None:
            return piece.host.view(piece.dtype).view(piece.shape)
        home = piece.home
        assert home is not None
        view = (home.file.view(home.name) if views is None else views.view(home.file, home.name)).view(piece.shape)
        expected = known_sum(piece)
        if self.config.verify != "header" and expected is not None and (got := sum64(memory_of(view))) != expected:
            raise mismatch(home.file, part_of(piece), "sum64", expected, got)
        return view

    def set_value(self, piece: Piece, value: torch.Tensor) -> None:
        """Make `value` what the piece is from now on; a file that is not ours is never written, the piece moves to our own."""
        with self.engine.exclusive() if self.engine is not None else self.lock:
            if self.engine is not None:
                self.engine.forget_layouts()  # nothing reads or shows the old version any more
            piece.version += 1
            if piece.host is not None:
                piece.host.view(piece.dtype).view(piece.shape).copy_(value)
            else:
                self._replace_home(piece, value)
            share(piece, value)
            for table in self.tables.values():
                table.forget(piece)

    def _replace_home(self, piece: Piece, value: torch.Tensor) -> None:
        if self.store is None:
            self.store = SpillStore.create(self.config.path, needed=piece.nbytes)
        before, piece.home = piece.home, put_away(self.store, piece, value, crc=self.crc)
        self.handed.moved(piece, self.store.file)
        if before is not None and before.file is self.store.file:
            drop_home(self.store, before)

    def renew_activations(self) -> None:
        """The device changed: what blocks save goes elsewhere from now on."""
        self.activations.close()
        self.activations = self._activations()

    def _activations(self) -> Activations:
        trial = self.activation.trial
        reserve = partial(self.activation, 1, RESERVE_TOKENS, trial.example if trial is not None else None)
        return Activations(self.config, self.units, self.device, self.timeline, self.plan, reserve, StepToCome(self))

    @property
    def crc(self) -> Crc:
        """When the CRC-32 of stored weights is compared."""
        return CRC[self.config.verify]

    @contextmanager
    def lend(self, module: nn.Module, names: tuple[str, ...], write: bool) -> Iterator[dict[str, torch.Tensor]]:
        """Real values of a module's own parameters; see `core.tensors`."""
        lent: dict[str, torch.Tensor] = {}
        for name in names:
            parameter = module._parameters.get(name)
            piece = self.piece_of(parameter)
            lent[name] = data_of(getattr(module, name)) if piece is None else self.value(piece)
        yield lent
        if write:
            for name in names:
                piece = self.piece_of(module._parameters.get(name))
                if piece is not None and not piece.resident:
                    self.set_value(piece, lent[name])

    def plain_table(self, module: nn.Embedding) -> bool:
        """True if the module's forward is a lookup and nothing else."""
        return original_class(module).forward is nn.Embedding.forward

    def absent(self, module: nn.Module) -> dict[str, Piece]:
        """The module's own parameters whose values are away."""
        found: dict[str, Piece] = {}
        for name, parameter in module._parameters.items():
            piece = self.piece_of(parameter)
            if piece is not None and not piece.resident:
                found[name] = piece
        return found

    # -- copies and moves (see copying.py) -----------------------------------------------------------------------------------------

    def convert(
        self, module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool, original: Callable[..., nn.Module]
    ) -> nn.Module:
        """Stand in for `nn.Module._apply`."""
        return copying.convert(self, module, fn, recurse, original)

    def refuse(self, module: nn.Module, verb: str) -> None:
        """`to_empty` and `share_memory` would lose or duplicate weights that are away."""
        if any(not piece.resident for piece in self.pieces):
            raise errors.UnsupportedModelError(
                f"{self.config.technique}: {verb}() on a model whose weights are streamed",
                where=type(module).__name__,
                fix=f'Call torchwrap.unwrap(model, "{self.config.technique}") first.',
            )

    def before_deepcopy(self, module: nn.Module, memo: dict[int, Any]) -> None:
        """Called before a module of this model is deep-copied."""
        copying.before_deepcopy(self, module, memo)

    def after_deepcopy(self, module: nn.Module) -> None:
        """Called when a module of this model has come out of a deep copy."""
        if copying.is_root(self, module):
            self.root = weakref.ref(module)

    def reduce(self, module: nn.Module) -> tuple[Any, ...] | None:
        """Called when a module of this model is pickled."""
        return None if self.is_inert else copying.reduce(self, module)

    def inert(self) -> WeightsHandle:
        """A handle that owns nothing, for copies whose weights are all present."""
        return copying.inert(self)

    def twin(self, parameters: dict[int, nn.Parameter]) -> WeightsHandle:
        """An independent handle for a copy of the model, whose parameters are given by piece index."""
        return copying.twin(self, parameters)

    def rehome(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        copying.rehome(self, device)
        self.time_passes()

    def replan(self) -> None:
        """Dtypes changed: size the slots for what the pieces are now."""
        copying.replan(self)

    # -- ends --------------------------------------------------------------------------------------------------------------------

    def refuse_mixture(self) -> None:
        """Raise `ConflictError` for a call of the model while `stepping`, unless the running backward makes it (recomputation)."""
        if self.backward.runs_here:
            return
        raise errors.ConflictError(
            "torchwrap: a call of the model between backward() and step(): some of its weights are new already, others are still old",
            where="forward",
            fix="Call optimizer.step() first (or rollback()). For several backwards per step pass accumulate=N or overlap=False, for other "
            "calls between the two overlap=False.",
        )

    def hide_lent(self) -> None:
        """Take away again what an interrupted load_state_dict or backward left in memory."""
        self.backward.settle()
        for piece in self.lent.values():
            bind(piece.parameter, piece.absent)
        self.lent.clear()

    def call_lock(self) -> threading.RLock:
        """Held while layers change, so that a running forward ends first."""
        return self.lock

    def close(self) -> None:
        """End reading and remove our files (unless `keep`). The model must have been given its weights back before."""
        if self.engine is not None:
            self.engine.close()
        self.reader.close()
        for table in self.tables.values():
            table.free()
        if self.store is not None:
            self.store.close(keep=self.config.keep)
        self._end_watch()
        self.activations.close()
        self.on_close()


def _nothing() -> None:
    pass
