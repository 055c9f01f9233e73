"""`torchwrap.OffloadedOptimizer`: any elementwise torch optimizer with its state, and the streamed weights, on a disk.

To the outside it is an ordinary `torch.optim.Optimizer`: parameter groups, schedulers, `state_dict` in the format of the wrapped class.
Inside, each gradient is used as soon as backward no longer needs the old weight, in a thread beside it (gradients.py, updates.py);
`step()` waits and does the rest. The wrapped class itself computes, so the bits are those of training in memory.

Sources: Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", 2021 (state on the disk, updated
in pieces); Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU", 2024 (the update overlapped
with backward without staleness). Where we differ: any elementwise class, bit-identical, and a kill at any moment loses nothing committed.
"""

from __future__ import annotations

import functools
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import parse_size
from torchwrap.core.transaction import inner_model, records_of
from torchwrap.optimizer.arguments import asked_for, check_arguments, check_model, timing_of
from torchwrap.optimizer.chunks import Chunks, Update
from torchwrap.optimizer.elementwise import Rule, settings_of, step_of
from torchwrap.optimizer.gradients import Gradients
from torchwrap.optimizer.pace import Pace, footprint_of
from torchwrap.optimizer.persist import check_same_run, describe_run, from_json, warn_of_other_settings
from torchwrap.optimizer.targets import Target, can_stream, records_needed
from torchwrap.optimizer.updates import Job, Updater
from torchwrap.optimizer.values import Values
from torchwrap.storage import aio
from torchwrap.storage.generations import GenerationStore
from torchwrap.storage.heap import keep_heap_small
from torchwrap.stream.units import Unit
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.training import Footprint, room_for

__all__ = ["OffloadedOptimizer"]

_LIVE: weakref.WeakSet[OffloadedOptimizer] = weakref.WeakSet()


class OffloadedOptimizer(torch.optim.Optimizer):
    """Trains a model whose weights and optimizer state do not fit in memory, with the bits of training in memory.

    Args:
        model: usually wrapped by `torchwrap.offload`; an ordinary model works too, with only the state on the disk.
        cls: the optimizer class; every class that treats elements one by one.
        params: parameters or groups, as for any optimizer; `None`: all of the model's.
        path: a folder for the run, which can be continued after a crash: constructing with a folder that holds a committed run of the
            same model goes on from there (weights, state, settings, `steps`). `None`: a temporary folder, nothing is kept.
        overlap: update during backward. Then gradients are gone when `backward()` returns, and what reads or changes them by hand (clipping
            by hand, a `GradScaler`) raises: pass `overlap=False` for those, and for a call between `backward()` and `step()`, which would
            compute with old small weights and new large ones. In several processes gradients always wait, in memory, until
            they are averaged (`DistributedDataParallel` around the model first, then `offload`).
        max_grad_norm: clip by total norm, exactly as `torch.nn.utils.clip_grad_norm_` does; updates then begin after backward.
        accumulate: backwards per step.
        gradients: where gradients that have to wait for the step do so; "auto" takes memory if half of what is free suffices.
        durability: "save": what `commit()` stored survives; "step": every step commits; "none": nothing is kept, half the room.
        chunk: bytes of a parameter updated at a time.
        **options: of `cls`: `lr=1e-4`, `fused=True`, ...

    Attributes:
        steps: steps taken, those of the run that was continued included.
        grad_norm: total norm of the last step's gradients before clipping, with `max_grad_norm`; a tensor of no dimension.

    Raises:
        ConfigError: a class that is not elementwise, or a folder that holds something else.
        ConflictError: another optimizer of this class, not closed, drives some of the parameters.
        DiskFullError: the disk cannot take the state; raised here, not in the middle of training.

    Exactness: parameters and state bit-identical to `cls` on a model in memory, on the same device, dtype and number of threads.
    Cost: on the disk, weights and state, twice with `path`; in memory, three chunks of each of their streams, and gradients that wait.

    Example:
        >>> import torch, torchwrap
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
        >>> model = torchwrap.offload(model, params="disk", units=("0", "2"))
        >>> optimizer = torchwrap.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 256)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.steps
        2
        >>> optimizer.close()
    """

    steps_absent_weights = True  # see stepping.py

    def __init__(
        self,
        model: nn.Module,
        cls: type[torch.optim.Optimizer],
        *,
        params: Iterable[Any] | None = None,
        path: str | os.PathLike[str] | None = None,
        overlap: bool = True,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        gradients: Literal["auto", "host", "disk"] = "auto",
        durability: Literal["save", "step", "none"] = "save",
        chunk: int | str = "16MiB",
        **options: Any,
    ) -> None:
        check_model(model)
        check_arguments(path, max_grad_norm, accumulate, gradients, durability, chunk, overlap)
        self._rule = Rule(cls, options)
        self._model_names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
        # Anywhere inside: peft and others put an offloaded model into one of theirs.
        records = [record for module in inner_model(model).modules() for record in records_of(module).values()]
        self._handle = next((r.handle for r in records if isinstance(r.handle, WeightsHandle)), None)
        self._targets: list[Target] = []
        self._whole: torch.optim.Optimizer | None = None
        self._chunk = parse_size(chunk, field="chunk")
        self._max_grad_norm = max_grad_norm
        self._durability: Literal["save", "step", "none"] = "none" if path is None else durability
        self._scale: torch.Tensor | None = None
        self._clipped = False
        self._done: set[Target] = set()  # of a step that failed half-way
        self.steps: int = 0
        self.grad_norm: torch.Tensor | None = None
        super().__init__(model.parameters() if params is None else params, self._rule.template.defaults)
        self._check_alone(target.parameter for target in self._targets)

        keep_heap_small()
        folder = None if path is None else Path(path).expanduser()
        kept = None if self._durability == "none" else folder
        self._store = GenerationStore(kept, beside=folder)
        try:
            handle = self._handle
            timeout_s = handle.config.io_timeout_s if handle is not None else 60.0
            mode: Literal["auto", "direct", "buffered"] = handle.reader.mode if handle is not None else "auto"
            self._reader = reader = aio.Reader(timeout_s=timeout_s, mode=mode)
            self._values = Values(self._store, handle)
            self._chunks = Chunks(self._rule, self._store, reader, self._values.landed)
            self._updater = Updater(self._chunks, handle.engine if handle is not None else None, timeout_s)
            trained = sum(t.parameter.numel() * t.parameter.element_size() for t in self._targets if t.parameter.requires_grad)
            room = room_for(handle.units if handle is not None else (), self._chunk)
            self._pace = Pace(handle, self._updater, self._chunks)
            self._asked = asked_for(overlap, max_grad_norm, accumulate, gradients)
            self._may_take = self._asked.take
            self._timing_of = functools.partial(timing_of, trained_bytes=trained, room=room, beside=folder)
            self._gradients = Gradients(_groups_of(self), handle, self._updater, self._timing_of(self._asked))
            self._shut = weakref.finalize(self, _close, self._updater, self._gradients, reader, self._store)
            if handle is not None:
                handle.optimizer = weakref.ref(self)
            self._prepare()
            if self._store.generation:
                check_same_run(self._store.run, cls, self._targets, str(folder))
                warn_of_other_settings(self._store.run, self.param_groups)
                self._restore()
        except BaseException:
            self._store.close()
            raise
        _LIVE.add(self)

    # -- the face of an optimizer -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as with any optimizer; room for their state is reserved at once."""
        if hasattr(self, "_values"):
            new = param_group["params"] = _listed(param_group["params"])
            self._check_alone(new)
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        for parameter in self.param_groups[number]["params"]:
            self._targets.append(self._target(parameter, number))
        if hasattr(self, "_values"):
            self._prepare()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients.

        Raises:
            ConflictError: a backward has updated weights already, and `step()` was not called.
        """
        if self._gradients.began:
            raise errors.ConflictError(
                "OffloadedOptimizer: gradients cannot be given up, the backward has updated weights with them already",
                where="zero_grad",
                fix="Call step() (or rollback()), or pass overlap=False to decide after backward.",
            )
        self._updater.take_unfinished()
        self._gradients.forget()
        self._clipped, self._scale = False, None
        self._done.clear()
        for target in self._targets:
            if target.is_taken():
                target.parameter.grad = None
        super().zero_grad(set_to_none)
        self._watch()
        self._pace.begin()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Finish the update that backward began, or do all of it.

        Raises:
            ConflictError: settings were changed after weights had been updated with the old ones, or the gradients were used already.
            StorageError: reading or writing failed. Call again to go on where it stopped; the message says if that cannot be.
        """
        self._check_usable()
        loss: float | None = None
        if closure is not None:
            with self._gradients.deferred(), torch.enable_grad():
                loss = closure()
        if self._handle is not None:
            self._handle.backward.settle()
        self._gradients.check_untouched()
        self._updater.check()
        self._check_settings()
        for target in self._streamed():
            self._gradients.drop_cleared(target)
        self._clip()
        unfinished = self._updater.take_unfinished()
        again = {update.target for update in unfinished}
        fresh = self._gradients.collect([t for t in self._streamed() if t not in self._done and t not in again], self._scale)
        self._refuse_repetition([*unfinished, *fresh])
        self._carry_out([*unfinished, *fresh])
        self._step_whole()
        self._gradients.forget()
        self._clipped, self._scale = False, None
        self._done.clear()
        self.steps += 1
        self._watch()
        self._pace.end()
        if self._durability == "step":
            self.commit()
        return loss

    @property  # type: ignore[override]
    def state(self) -> Mapping[torch.Tensor, Any]:
        """What the wrapped class keeps, by parameter. Tensors show stored bytes and are read when used; writing to them has no effect."""
        found: dict[torch.Tensor, Any] = {}
        for target in self._targets if hasattr(self, "_values") else ():
            kept = self._state_of(target)
            if kept:
                found[target.parameter] = kept
        return found

    @state.setter
    def state(self, value: Any) -> None:
        """`torch.optim.Optimizer` sets an empty one when it is made; later the only ways in are steps and `load_state_dict`."""
        if value:
            raise errors.ConflictError("OffloadedOptimizer: state cannot be assigned", where="state", fix="Use load_state_dict().")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and state of the wrapped class, from this class or from a plain optimizer.

        Raises:
            ValueError: other groups than this optimizer's, in torch's words.

        Cost: values are written one by one; no copy of the whole is made.
        """
        self._check_usable()
        self._refuse_half_done("load_state_dict")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved = deepcopy(state_dict["param_groups"])
        if len(saved) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if any(len(old["params"]) != len(new["params"]) for old, new in zip(saved, self.param_groups, strict=True)):
            raise ValueError("loaded state dict contains a parameter group that doesn't match the size of optimizer's group")
        numbered = [number for group in saved for number in group["params"]]
        entries = {
            target.parameter: dict(state_dict["state"][number])
            for target, number in zip(self._targets, numbered, strict=True)
            if number in state_dict["state"]
        }
        for old, group in zip(saved, self.param_groups, strict=True):
            old["params"] = group["params"]
        template = self._rule.template
        before = template.param_groups
        try:
            template.__setstate__({"state": entries, "param_groups": saved})  # the class brings old formats up to date
            for group, old in zip(self.param_groups, template.param_groups, strict=True):
                group.update(old)
            self._prepare()
            for target in self._targets:
                self._load(target, template.state.get(target.parameter, {}))
        finally:
            template.__setstate__({"state": {}, "param_groups": before})
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    # -- for training loops ------------------------------------------------------------------------------------------------------------

    def configure(
        self,
        *,
        overlap: bool | None = None,
        accumulate: int | None = None,
        gradients: Literal["auto", "host", "disk"] | None = None,
        norms: bool = False,
    ) -> None:
        """Change between two steps when gradients are used; `None` leaves a setting as it is.

        Args:
            overlap: update during backward, unless the constructor was told not to or clips itself.
            accumulate: backwards per step.
            gradients: where gradients wait.
            norms: let gradients that are used during backward tell their norm (not more: they cannot be scaled). Costs a pass over each.

        Raises:
            ConflictError: in the middle of a step.
        """
        self._refuse_half_done("configure")
        asked = asked_for(
            self._asked.take if overlap is None else self._may_take and overlap,
            None,
            self._asked.backwards if accumulate is None else accumulate,
            self._asked.where if gradients is None else gradients,
        )
        asked = replace(asked, norms=norms)
        check_arguments(None, None, asked.backwards, asked.where, "save", self._chunk)
        self._asked = asked
        self._gradients.timing = self._timing_of(asked)

    @property
    def max_grad_norm(self) -> float | None:
        """What this optimizer clips the total norm to, by itself."""
        return self._max_grad_norm

    @property
    def durability(self) -> Literal["save", "step", "none"]:
        """What a crash leaves; "none" without a folder."""
        return self._durability

    # -- generations -----------------------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make weights and state as they are now what a crash leaves, and what `OffloadedOptimizer(path=...)` continues.

        Buffers of the model (running statistics) are not parameters: save them with `model.state_dict()`.

        Raises:
            ConfigError: there is no folder to keep it in.
            StorageError: it failed; the commit before is what a crash leaves.

        Cost: one flush of what was written, and a copy of the parameters in memory.
        """
        self._check_usable()
        if self._durability == "none":
            raise errors.ConfigError("OffloadedOptimizer: there is nothing to commit to", where="path", fix="Pass path= (and durability).")
        self._refuse_half_done("commit")
        kept: dict[str, dict[str, Any]] = {}
        for target in self._targets:
            if target.parameter.numel() and (target.parameter.requires_grad or target.changed):
                self._store.reserve(records_needed(target, self._chunk, self._store))
                self._values.save_weight(target)
                if not target.streamed:
                    self._values.save_whole(target, self._state_of(target))
                kept[target.name] = {"order": list(target.order), "numbers": target.numbers}
        self._store.commit(describe_run(self._rule.cls, self._targets, kept, self.param_groups, self.steps))

    def rollback(self) -> None:
        """Go back to the last commit: weights, state, settings and `steps`.

        Raises:
            StorageError: nothing was committed, or a parameter was not trained then and is now.
        """
        self._check_usable()
        self._updater.wait()
        self._updater.take_unfinished()
        with nullcontext() if self._handle is None else self._handle.lock:
            self._store.rollback()
            self._gradients.forget()
            self._done.clear()
            self._restore()
        self.zero_grad()

    def close(self) -> None:
        """End the threads and let the folder go; nothing is committed. The model goes on working with the weights it has."""
        self._shut()

    def stats(self) -> dict[str, int | float]:
        """Bytes on the disk and moved since the start (weights, gradients, state), and seconds spent in the optimizer class."""
        return {
            "steps": self.steps,
            "disk_bytes": self._store.file.nbytes,
            "state_bytes": sum(t.numel * dtype.itemsize for t in self._streamed() for dtype in t.layout.values()),
            "bytes_read": self._reader.stats.bytes,
            "bytes_written": self._store.bytes_written,
            "update_s": self._chunks.seconds,
            "parameters_streamed": len(self._streamed()),
            "parameters_in_memory": len(self._targets) - len(self._streamed()),
        }

    def footprint(self) -> Footprint:
        """What this optimizer adds to a training step in memory and bytes moved; see `WeightsHandle.predict_training`."""
        assert self._handle is not None
        return footprint_of(self._streamed(), self._store, self._gradients.timing, self._handle)

    @property
    def write_rate(self) -> float:
        """Bytes per second while writing; 0.0 before the first step."""
        return self._store.bytes_written / self._chunks.writing_s if self._chunks.writing_s else 0.0

    @property
    def computing_s(self) -> float | None:
        """Seconds of the last step without waiting for a disk; None before the first."""
        return self._pace.computing_s

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an OffloadedOptimizer owns files and threads: make a new one and load_state_dict(optimizer.state_dict())")

    # -- making ready --------------------------------------------------------------------------------------------------------------------

    def _target(self, parameter: nn.Parameter, group: int) -> Target:
        handle = self._handle
        piece = handle.piece_of(parameter) if handle is not None else None
        name = self._model_names.get(id(parameter)) or f"parameter {len(self._targets)}"
        unit: Unit | None = None
        if handle is not None and piece is not None and not piece.resident:
            mine = [unit for unit in handle.units if any(other is piece for other in unit.pieces)]
            unit = next((unit for unit in mine if unit.kind != "rows"), mine[0])
        layout = self._rule.layout(settings_of(self.param_groups[group]), parameter.dtype, parameter.device)
        return Target(name, parameter, group, piece, unit, dict(layout), streamed=can_stream(parameter, piece))

    def _streamed(self) -> list[Target]:
        return [target for target in self._targets if target.streamed]

    def _prepare(self) -> None:
        """What the class keeps with its present settings, and an ordinary optimizer for what stays in memory."""
        for target in self._targets:
            target.layout = dict(
                self._rule.layout(settings_of(self.param_groups[target.group]), target.parameter.dtype, target.parameter.device)
            )
        groups = []
        for number, group in enumerate(self.param_groups):
            small = [t.parameter for t in self._targets if t.group == number and not t.streamed]
            if small:
                groups.append({**settings_of(group), "params": small})
        if groups:
            before = {} if self._whole is None else self._whole.state
            self._whole = self._rule.cls(groups, **self._rule.options)
            self._whole.state.update(before)
        self._watch()

    def _watch(self) -> None:
        """Room on the disk for what is trained by now, and hooks on it."""
        trained = [t for t in self._targets if t.parameter.requires_grad and t.parameter.numel()]
        wanted = [t for t in trained if t.streamed or self._durability != "none"]
        self._store.reserve(record for target in wanted for record in records_needed(target, self._chunk, self._store))
        self._gradients.watch(self._streamed(), [t for t in self._targets if not t.streamed])

    # -- a step --------------------------------------------------------------------------------------------------------------------------

    def _clip(self) -> None:
        """Scale all gradients as `clip_grad_norm_` does; once for each step, also if that is repeated after an error."""
        if self._max_grad_norm is None or self._clipped:
            return
        if (scaled := self._gradients.scaled()) is not None:
            raise errors.ConflictError(
                f"OffloadedOptimizer: the gradient of {scaled.name} was clipped already, and would be clipped again with max_grad_norm=",
                where=scaled.name,
                fix="Clip in one place: leave max_grad_norm= out here, or do not call clip_grad_norm_ (transformers: max_grad_norm=0).",
            )
        trained = [t for t in self._targets if t.parameter.grad is not None or self._gradients.is_parked(t)]
        present = [t.parameter for t in trained if not self._gradients.is_parked(t)]
        if len(present) == len(trained):
            self.grad_norm = torch.nn.utils.clip_grad_norm_(present, self._max_grad_norm)
        else:
            norms = self._gradients.norms
            # The norm of a norm is itself: torch's function does the rest, in its order.
            single = [norms[t] if t in norms else torch.nn.utils.get_total_norm([t.parameter.grad]) for t in trained]  # type: ignore[list-item]
            self.grad_norm = torch.nn.utils.get_total_norm(single)
            torch.nn.utils.clip_grads_with_norm_(present, self._max_grad_norm, self.grad_norm)
            self._scale = torch.clamp(self._max_grad_norm / (self.grad_norm + 1e-6), max=1.0)
        self._clipped = True

    def _check_settings(self) -> None:
        used = self._gradients.settings
        for number, (old, group) in enumerate(zip(used or (), self.param_groups, strict=False)):
            now = settings_of(group)
            changed = [name for name in now if name not in old or not _same(old[name], now[name])]
            if changed:
                name = changed[0]
                raise errors.ConflictError(
                    f"OffloadedOptimizer: {name} of group {number} was changed from {old.get(name)!r} to {now[name]!r} between "
                    "backward and step; the backward has updated weights with the old value",
                    where=f"param_groups[{number}]",
                    fix="Change settings before backward(), or pass overlap=False.",
                )

    def _refuse_repetition(self, updates: list[Update]) -> None:
        if updates or self._gradients.began or self._done:
            return
        used = next((target for target in self._targets if target.is_taken()), None)
        if used is not None:
            raise errors.ConflictError(
                f"OffloadedOptimizer: step() again on gradients that are used up (that of {used.name})",
                where="step",
                fix="Run backward() before each step, or pass overlap=False to keep gradients.",
            )

    def _carry_out(self, updates: list[Update]) -> None:
        """Hand updates to the worker, those of one unit together, and wait."""
        jobs: dict[int | None, Job] = {}
        for update in updates:
            unit = update.target.unit if update.target.away else None
            jobs.setdefault(None if unit is None else unit.index, Job(unit, [])).updates.append(update)
        self._watch()  # trained since the last time
        targets = [update.target for update in updates]
        for job in jobs.values():
            self._updater.submit(job)
        self._updater.wait()
        left = {update.target for update in self._updater.unfinished}
        self._done.update(target for target in targets if target not in left)
        self._updater.check()

    def _step_whole(self) -> None:
        if self._whole is None:
            return
        numbers = [n for n in range(len(self.param_groups)) if any(t.group == n and not t.streamed for t in self._targets)]
        for number, group in zip(numbers, self._whole.param_groups, strict=True):
            group.update(settings_of(self.param_groups[number]))
        step_of(self._whole)()
        for target in self._targets:
            if not target.streamed and target.parameter.grad is not None:
                target.changed = True

    def _check_alone(self, parameters: Iterable[Any]) -> None:
        """Two optimizers would take each other's stand-ins for gradients."""
        mine = {id(parameter[1] if isinstance(parameter, tuple) else parameter) for parameter in parameters}
        for again in (False, True):
            name = next((n for other in list(_LIVE) if other is not self for n in other._drives(mine)), None)
            if name is None:
                return
            if not again:
                gc.collect()  # one that is only in a cycle drives nothing
        raise errors.ConflictError(
            f"OffloadedOptimizer: another one drives {name} already", where=name or "", fix="Call close() on the old optimizer first."
        )

    def _drives(self, parameters: set[int]) -> list[str]:
        return [t.name for t in self._targets if id(t.parameter) in parameters] if self._shut.alive else []

    def _check_usable(self) -> None:
        if not self._shut.alive:
            raise errors.StorageError("OffloadedOptimizer: this optimizer was closed", fix="Make a new one, with the same path= to go on.")

    def _refuse_half_done(self, what: str) -> None:
        self._updater.wait()
        if self._gradients.began or self._updater.unfinished or self._done:
            raise errors.ConflictError(
                f"OffloadedOptimizer: {what}() in the middle of a step", where=what, fix="Call step() first, or rollback()."
            )

    # -- values --------------------------------------------------------------------------------------------------------------------------

    def _state_of(self, target: Target) -> dict[str, Any]:
        if target.streamed:
            return target.state(self._store)
        return {} if self._whole is None else dict(self._whole.state.get(target.parameter, {}))

    def _load(self, target: Target, entries: Mapping[str, Any]) -> None:
        """Replace what is kept of one parameter, cast as torch's own `load_state_dict` casts it."""
        settings = self.param_groups[target.group]
        plain: dict[str, Any] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and key == "step":
                on_device = settings.get("capturable") or settings.get("fused")
                value = value.to(dtype=torch.float32, device=target.parameter.device) if on_device else value
            elif isinstance(value, torch.Tensor) and not target.streamed:
                floating = target.parameter.is_floating_point()
                value = value.to(dtype=target.parameter.dtype if floating else value.dtype, device=target.parameter.device)
            plain[key] = value
        if target.streamed:
            self._values.load_state(target, plain)
        elif self._whole is not None:
            self._whole.state.pop(target.parameter, None)
            if plain:
                self._whole.state[target.parameter] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in plain.items()}

    def _restore(self) -> None:
        """Make what was committed what the model and this optimizer have."""
        run = self._store.run
        kept = {name: from_json(numbers) for name, numbers in run["kept"].items()}  # type: ignore[union-attr]
        self.steps = int(run["steps"])  # type: ignore[arg-type]
        for group, settings in zip(self.param_groups, run["groups"], strict=True):  # type: ignore[arg-type]
            group.update(from_json(settings))
        self._prepare()
        for target in self._targets:
            found = kept.get(target.name)
            if found is None and target.changed:
                raise errors.StorageError(
                    f"{target.name} was not trained at the last commit and is now", where=target.name, fix="Load a checkpoint."
                )
            entries = found or {"order": [], "numbers": {}}
            target.order, target.numbers, target.torn = tuple(entries["order"]), entries["numbers"], False
            if found is not None:
                self._values.restore_weight(target)
                if not target.streamed and self._whole is not None:
                    self._whole.state.pop(target.parameter, None)
                    if whole := self._values.restored_whole(target):
                        self._whole.state[target.parameter] = whole


def _groups_of(optimizer: OffloadedOptimizer) -> Callable[[], list[dict[str, Any]]]:
    """The optimizer's groups for hooks on parameters, which must not keep it alive."""
    reference = weakref.ref(optimizer)

    def groups() -> list[dict[str, Any]]:
        found = reference()
        return found.param_groups if found is not None else []

    return groups


def _listed(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _close(updater: Updater, gradients: Gradients, reader: aio.Reader, store: GenerationStore) -> None:
    gradients.close()
    updater.close()
    reader.close()
    store.close()


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)
