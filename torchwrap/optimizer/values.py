"""Moving weights and state between a model, an optimizer's store and a checkpoint, one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.targets import Target, flat_weight, in_place
from torchwrap.storage.checksum import crc32, memory_of
from torchwrap.storage.generations import GenerationStore
from torchwrap.stream.pieces import drop_home
from torchwrap.stream.units import Home

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["Values"]


class Values:
    """Values of the parameters of one optimizer.

    Args:
        store: of the optimizer.
        handle: of the offloaded model, if it is one.
    """

    def __init__(self, store: GenerationStore, handle: WeightsHandle | None) -> None:
        self._store, self._handle = store, handle
        self._saved: dict[str, int] = {}  # what the weights in the store are, as `_version` tells

    def landed(self, target: Target, home: Home | None) -> None:
        """A weight has new values: in the store, if a home is given, else in memory."""
        piece, handle = target.piece, self._handle
        if piece is None or handle is None or not target.away:
            return
        piece.version += 1
        if home is None:
            return
        before, piece.home = piece.home, home
        piece.checksum = self._store.records[home.name].whole().sum64
        handle.handed.moved(piece, self._store.file)
        self._saved[home.name] = piece.version
        if before is not None and handle.store is not None and before.file is handle.store.file:
            drop_home(handle.store, before)
        for table in handle.tables.values():
            table.forget(piece)

    # -- to the store ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def save_weight(self, target: Target) -> None:
        """Have the present weight in the store; nothing is written if it is there."""
        name, version = target.weight_name, self._version(target)
        if self._store.records[name].current is None or self._saved.get(name) != version:
            weight = target.parameter.detach()
            if target.away and self._handle is not None and target.piece is not None:
                weight = self._handle.value(target.piece)
            self._store.put(name, weight)
            self._saved[name] = version

    def save_whole(self, target: Target, state: Mapping[str, Any]) -> None:
        """Have in the store what is kept per element of a parameter in memory; the rest goes into `target.numbers`."""
        target.order = tuple(state)
        target.numbers = {key: value for key, value in state.items() if key not in target.layout}
        for key in target.layout:
            if key in state:
                self._store.put(target.state_name(key), state[key])

    def load_state(self, target: Target, entries: Mapping[str, Any]) -> None:
        """Replace what is kept of a streamed parameter.

        Raises:
            ConfigError: the state is not that of this class with these settings.
        """
        missing = [key for key in target.layout if key not in entries]
        if entries and missing:
            raise errors.ConfigError(
                f"OffloadedOptimizer: the state of {target.name} lacks {missing[0]!r}",
                where=target.name,
                fix="Construct with the settings the state was made with (amsgrad, momentum, master_weights).",
            )
        for key, dtype in target.layout.items() if entries else ():
            self._store.put(target.state_name(key), entries[key].detach().reshape(target.parameter.shape).to(dtype))
        target.order = tuple(entries)
        kept = {key: value for key, value in entries.items() if key not in target.layout}
        kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in kept.items()}
        target.numbers = in_place(target.numbers, kept)

    # -- from the store ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore_weight(self, target: Target) -> None:
        """Make the stored weight the model's.

        Raises:
            CorruptDataError: a weight kept in memory is not what was written; one that is streamed is checked when it is read.
        """
        record = self._store.records[target.weight_name]
        memory = flat_weight(target)
        engine = self._handle.engine if self._handle is not None else None
        withheld = (target.piece,) if engine is not None and target.piece is not None and target.away else ()
        if engine is not None and withheld:
            engine.begin_update(withheld)
        try:
            if memory is not None:
                memory.copy_(self._store.get(record.name).view(-1))
            else:
                version = record.whole()
                self.landed(target, Home(self._store.file, record.name, record.offset(version.half), record.nbytes))
        finally:
            if engine is not None and withheld:
                engine.end_update(withheld)
        target.changed = True
        self._saved[record.name] = self._version(target)

    def restored_whole(self, target: Target) -> dict[str, Any]:
        """What is kept of a parameter in memory."""
        device = target.parameter.device
        return {
            key: self._store.get(target.state_name(key)).to(device) if key in target.layout else target.numbers[key] for key in target.order
        }

    def _version(self, target: Target) -> int:
        piece = target.piece
        if target.away and piece is not None:
            return piece.version
        # torch's count leaves out what fused kernels (torch 2.13) and `.data` write. Below zero, to differ from every count.
        return -1 - crc32(memory_of(target.parameter))
