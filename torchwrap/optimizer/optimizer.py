"""`torchwrap.OffloadedOptimizer`: any elementwise torch optimizer with its state, and the streamed weights, on a disk.

To the outside it is an ordinary `torch.optim.Optimizer`: parameter groups, schedulers, `state_dict` in the format of the wrapped class.
Inside, each gradient is used as soon as backward no longer needs the old weight, in a thread beside it; `step()` waits and does the rest.
The wrapped class itself computes, so the bits are those of training in memory. This file is the face; what works behind it is listed in
workshop.py.

Sources: Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", 2021 (state on the disk, updated
in pieces); Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU", 2024 (the update overlapped
with backward without staleness). Where we differ: any elementwise class, bit-identical, and a kill at any moment loses nothing committed.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import parse_size
from torchwrap.core.transaction import inner_model, records_of
from torchwrap.optimizer.arguments import asked_for, check_arguments, check_model
from torchwrap.optimizer.elementwise import Rule, scaling_of, settings_of
from torchwrap.optimizer.parameters import Parameters, listed
from torchwrap.optimizer.persist import check_same_run, warn_of_other_settings
from torchwrap.optimizer.run import matched
from torchwrap.optimizer.workshop import Site, Workshop
from torchwrap.weights.budget import count_libraries
from torchwrap.weights.footprint import Footprint
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.stepping import warn_of_mixture

__all__ = ["OffloadedOptimizer"]


class OffloadedOptimizer(torch.optim.Optimizer):
    """Trains a model whose weights and optimizer state do not fit in memory, with the bits of training in memory.

    Args:
        model: usually wrapped by `torchwrap.offload`; an ordinary model works too, with only the state on the disk.
        cls: the optimizer class; every class that treats elements one by one.
        params: parameters or groups, as for any optimizer; `None`: all of the model's.
        path: a folder for the run, which can be continued after a crash: constructing with a folder that holds a committed run of the
            same model goes on from there (weights, state, settings, `steps`). `None`: a temporary folder, nothing is kept.
        overlap: update during backward. Then gradients are gone when `backward()` returns, and what reads or changes them by hand (clipping
            by hand, a `GradScaler`) raises, and so does a call of an offloaded model before `step()`, when large weights are new and small
            ones old: pass `overlap=False` for those, and where weights are written to between the start of backward and `step()` (a write
            through `.data` is not noticed, and is lost). A model that is not offloaded cannot refuse: do not call it then. In several
            processes gradients always wait in memory until they are averaged (`DistributedDataParallel` first, then `offload`).
        max_grad_norm: clip by total norm, exactly as `clip_grad_norm_(model.parameters(), ...)` does; updates then begin after backward.
        accumulate: backwards per step.
        gradients: where gradients that have to wait for the step do so; "auto" takes memory if half of what is free suffices.
        durability: "save": what `commit()` stored survives; "step": every step commits; "none": nothing is kept, half the room.
        chunk: bytes of a parameter updated at a time; fewer if they and their state would be more than three times that.
        **options: of `cls`: `lr=1e-4`, `fused=True`, ...

    Attributes:
        steps: steps taken, those of the run that was continued included.

    Raises:
        ConfigError: a class that is not elementwise, or a folder that holds something else.
        ConflictError: another optimizer of this class, not closed, drives some of the parameters; or parts of the model were wrapped by
            themselves: make one optimizer for each.
        BudgetError, DiskFullError: the limit of the process cannot take a step, or the disk the state; raised here, not during training.

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
        # Anywhere inside: peft and others put an offloaded model into one of theirs.
        records = [record for module in inner_model(model).modules() for record in records_of(module).values()]
        self._handle = next((r.handle for r in records if isinstance(r.handle, WeightsHandle)), None)
        count_libraries(self._handle)
        self._rule = Rule(cls, options)
        self._parameters = Parameters(model, self._handle, self._rule)
        self._durability: Literal["save", "step", "none"] = "none" if path is None else durability
        self.steps: int = 0
        # Asked by GradScaler, which else divides gradients itself, in other bits; before they are clipped it has to.
        self._step_supports_amp_scaling: bool = max_grad_norm is None and getattr(self._rule.template, "_step_supports_amp_scaling", False)
        super().__init__(model.parameters() if params is None else params, self._rule.template.defaults)
        self._parameters.check_free(target.parameter for target in self._parameters.targets)
        folder = None if path is None else Path(path).expanduser()
        site = Site(None if self._durability == "none" else folder, folder, parse_size(chunk, field="chunk"))
        self._asked = asked_for(overlap, max_grad_norm, accumulate, gradients)
        self._may_take, self._max_grad_norm = self._asked.take, max_grad_norm
        self._works = works = Workshop(self._rule, self._parameters, self._handle, site, self._asked, max_grad_norm, _groups_of(self))
        self._shut = weakref.finalize(self, works.close_unasked)
        try:
            works.check_room()
            works.prepare(self.param_groups)
            if works.store.generation:
                check_same_run(works.store.run, cls, self._parameters.targets, str(folder))
                warn_of_other_settings(works.store.run, self.param_groups)
                self._restore()
        except BaseException:
            self._shut()
            raise
        self._parameters.take()
        if self._handle is not None:
            self._handle.optimizer = weakref.ref(self)

    # -- the face of an optimizer -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as with any optimizer; room for their state is reserved at once."""
        new = param_group["params"] = listed(param_group["params"])
        self._parameters.check_usable(new)
        if hasattr(self, "_works"):
            self._works.check_new(new)
        super().add_param_group(param_group)
        try:
            self._parameters.add(self.param_groups)
            if hasattr(self, "_works"):
                self._works.prepare(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            self._parameters.drop(len(self.param_groups))
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients.

        Raises:
            ConflictError: weights have been updated with them already, by a backward or by a `step()` that failed half-way.
        """
        self._conclude()
        if self._works.step.changed:
            raise errors.ConflictError(
                "OffloadedOptimizer: gradients cannot be given up, weights were updated with them already",
                where="zero_grad",
                fix="Call step() to finish the update, or rollback() to undo it; pass overlap=False to decide after backward.",
            )
        self._works.updater.give_up()
        self._works.step.over()
        for target in self._parameters.targets:
            if target.is_taken() and set_to_none:
                target.parameter.grad = None
        super().zero_grad(set_to_none)
        self._works.watch()
        self._works.pace.begin()

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
        if closure is None and self._works.step.repeated():
            return self._finished(None)
        self._conclude()
        loss: float | None = None
        if closure is not None:
            with self._works.gradients.deferred(), torch.enable_grad():
                loss = closure()
        count = self._works.take_step(self.param_groups, scaling_of(self))
        self._works.step.remember(self.steps + count)
        return self._finished(loss)

    @property  # type: ignore[override]
    def state(self) -> Mapping[torch.Tensor, Any]:
        """What the wrapped class keeps, by parameter. Tensors show stored bytes and are read when used; writing to them has no effect."""
        found: dict[torch.Tensor, Any] = {}
        for target in self._parameters.targets if hasattr(self, "_works") else ():
            kept = self._works.run.state_of(target, settings_of(self.param_groups[target.group]))
            if kept:
                found[target.parameter] = kept
        return found

    @state.setter
    def state(self, value: Any) -> None:
        """`torch.optim.Optimizer` sets an empty one when it is made; later the only ways in are steps and `load_state_dict`."""
        if value:
            raise errors.ConflictError("OffloadedOptimizer: state cannot be assigned", where="state", fix="Use load_state_dict().")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and state of the wrapped class, from this class or from a plain optimizer; no copy of the whole is made.

        Raises:
            ValueError: other groups than this optimizer's, in torch's words. ConfigError: another class's; nothing is changed.
        """
        self._check_usable()
        self._refuse_half_done("load_state_dict")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved, entries = matched(state_dict, self.param_groups, self._parameters.targets)
        with self._rule.loaded(entries, saved) as template:
            self._works.load(self.param_groups, template)
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
            ConflictError: in the middle of a step. BudgetError: no room for gradients that wait; nothing is changed.
        """
        self._refuse_half_done("configure")
        asked = asked_for(
            self._asked.take if overlap is None else self._may_take and overlap,
            None,
            self._asked.backwards if accumulate is None else accumulate,
            self._asked.where if gradients is None else gradients,
        )
        check_arguments(None, None, asked.backwards, asked.where, "save", self._works.site.chunk)
        self._works.retime(asked := replace(asked, norms=norms))
        self._asked = asked

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Total norm of the last step's gradients before clipping, with `max_grad_norm`; a tensor of no dimension."""
        return self._works.step.grad_norm

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
        self._works.commit(self.param_groups, self.steps)

    def rollback(self) -> None:
        """Go back to the last commit: weights, state, settings and `steps`.

        Raises:
            StorageError: nothing was committed, or a parameter was not trained then and is now.
        """
        self._check_usable()
        self._works.undo(self._restore)
        self.zero_grad()

    def close(self) -> None:
        """End the threads and let the folder go; nothing is committed. The model goes on working with the weights it has.

        Warns if that is in the middle of a step: weights that backward has updated cannot be undone, and the rest of the step is lost.
        So does an optimizer that is collected then.
        """
        if not self._shut.alive:
            return
        mixture = self._works.step.changed
        try:
            self._works.close()
        except Exception:
            self._shut.detach()
            raise
        self._shut.detach()  # not after an interrupt: the next call does the rest
        if mixture:
            fix = "Load a checkpoint before the weights are used. Call step() or rollback() before close() to have those of a step."
            warn_of_mixture("close()", fix, stacklevel=2)

    def steps_absent_weights(self, handle: WeightsHandle) -> bool:
        """Whether this optimizer knows where the weights of that handle are; see stepping.py."""
        return handle is self._handle

    def stats(self) -> dict[str, int | float]:
        """Bytes on the disk and moved since the start (weights, gradients, state), and seconds spent in the optimizer class."""
        return {"steps": self.steps, **self._works.stats()}

    def footprint(self) -> Footprint:
        """What this optimizer adds to a training step in memory and bytes moved; see `WeightsHandle.predict_training`."""
        return self._works.footprint()

    @property
    def write_rate(self) -> float:
        """Bytes per second while writing; 0.0 before the first step."""
        return self._works.write_rate

    @property
    def computing_s(self) -> float | None:
        """Seconds of the last step without waiting for a disk; None before the first."""
        return self._works.pace.computing_s

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an OffloadedOptimizer owns files and threads: make a new one and load_state_dict(optimizer.state_dict())")

    def _restore(self) -> None:
        """Make what was committed what the model and this optimizer have."""
        self.steps = self._works.run.restore_settings(self.param_groups)
        self._works.prepare(self.param_groups, {})
        self._works.run.restore_values()

    def _finished(self, loss: float | None) -> float | None:
        """`loss`, after what follows a step; if that fails or is interrupted, the next `step()` does it again, and takes none."""
        self.steps = self._works.step.ended(self.steps)
        self._works.watch()
        self._works.pace.end()
        if self._durability == "step":
            self._works.commit(self.param_groups, self.steps)
        self._works.step.forget()
        return loss

    def _conclude(self) -> None:
        """A step that was taken, and interrupted or failed behind that, is over: its gradients are not those of the next."""
        self.steps = self._works.step.ended(self.steps)
        self._works.step.forget()

    def _check_usable(self) -> None:
        if not self._shut.alive:
            raise errors.StorageError("OffloadedOptimizer: this optimizer was closed", fix="Make a new one, with the same path= to go on.")

    def _refuse_half_done(self, what: str) -> None:
        self._conclude()
        if self._works.step.half_done:
            raise errors.ConflictError(
                f"OffloadedOptimizer: {what}() in the middle of a step",
                where=what,
                fix="Call step() first, or rollback(); if the step cannot be finished, close() and make a new optimizer.",
            )


def _groups_of(optimizer: OffloadedOptimizer) -> Callable[[], list[dict[str, Any]]]:
    """The optimizer's groups for hooks on parameters, which must not keep it alive."""
    reference = weakref.ref(optimizer)

    def groups() -> list[dict[str, Any]]:
        found = reference()
        return found.param_groups if found is not None else []

    return groups
