"""Callbacks for transformers' `Trainer`: the plan beside every checkpoint, and training of offloaded models.

A callback owns no weights: taken out of the trainer, the model works as before. Models, handles and optimizers are found through the core
and by what they can do, so this module knows no technique. Facts about the trainer are those of transformers 5.23 and are held by
tests/integrations/test_trainer.py.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from torchwrap.core.config import Config, format_bytes
from torchwrap.core.errors import ConfigError, ConflictError, PlanError, TorchwrapWarning, UnsupportedModelError
from torchwrap.core.plan import FILE_NAME, Plan, plan_of
from torchwrap.core.technique import Handle, technique_named
from torchwrap.core.tensors import is_placeholder
from torchwrap.core.transaction import records_of

__all__ = ["OffloadCallback", "PlanCallback", "optimizer_settings"]


class PlanCallback(TrainerCallback, ExportableState):
    """Writes the plan (`torchwrap.json`) into every checkpoint, and compares it when training goes on from one.

    A difference that cannot change a result (another memory budget of an exact technique, on another machine) is a `TorchwrapWarning`;
    one that can (a lossy technique missing, added or set otherwise; another model) is a `PlanError`, before the first step. Nothing is
    applied here: the optimizer and the device placement were made for the model as it is.

    Args:
        on_difference: "auto" as above; "raise" or "warn" for every difference.

    Raises:
        PlanError: when training begins from a checkpoint whose plan differs.

    Example:
        >>> from torchwrap.integrations.transformers.callbacks import PlanCallback
        >>> PlanCallback().on_difference
        'auto'
    """

    def __init__(self, on_difference: Literal["auto", "raise", "warn"] = "auto") -> None:
        if on_difference not in ("auto", "raise", "warn"):
            raise ConfigError(f"PlanCallback: {on_difference!r}", where="on_difference", fix='Use "auto", "raise" or "warn".')
        self.on_difference: Literal["auto", "raise", "warn"] = on_difference
        self.plan: str | None = None  # as the last checkpoint had it
        self._model: weakref.ref[nn.Module] | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer stores for this callback in `trainer_state.json`: the plan, because only that file is known when resuming."""
        model = self._model() if self._model is not None else None
        if model is not None:
            self.plan = plan_of(_planned(model)).to_json()
        return {"args": {"on_difference": self.on_difference}, "attributes": {"plan": self.plan}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare with the checkpoint that training goes on from, if it has a plan."""
        model: nn.Module = kwargs["model"]
        self._model = weakref.ref(model)
        stored = _stored_plan(args, state) if state.global_step else None
        if isinstance(state.stateful_callbacks, dict):
            # transformers 5.23 fails at the next save if a callback with a state is new in a run that goes on.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if stored is not None:
            _compare(stored, Plan.from_json(plan_of(_planned(model)).to_json()), self.on_difference)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the plan into the checkpoint that was just written."""
        folder = _checkpoint(args, state)
        if not state.is_world_process_zero:
            return
        if not folder.is_dir():
            if not state.is_hyper_param_search:
                return  # save_total_limit has removed it already, in favour of the best one
            # It uses folders of its own.
            warnings.warn(f"PlanCallback: no plan written, there is no {folder}", TorchwrapWarning, stacklevel=2)
            return
        plan_of(_planned(kwargs["model"])).save(folder)


class OffloadCallback(TrainerCallback):
    """Trains an offloaded model through `Trainer(model, args, optimizers=(OffloadedOptimizer(model, ...), None), callbacks=[...])`.

    * `max_grad_norm`, `gradient_accumulation_steps` and `fp16` of the arguments decide when the optimizer may use gradients: during
      backward if nothing needs all of them first, else after it. The trainer clips by itself, once, also gradients that are on the disk.
    * Every checkpoint is followed by a commit of the optimizer's folder, if it has one. The trainer has read the tensors by then
      (5.23 calls `on_save` last); a step is complete when `step()` returns, so what it read is what is committed.
    * Each log line gets `offload_read_bytes` (weights and state read since the last line), `offload_written_bytes` (written, likewise)
      and `offload_stall_share` (share of the time that the model waited for weights).

    Raises:
        ConflictError: an ordinary optimizer would train weights that are away.
        ConfigError: clipping is asked for twice.
        UnsupportedModelError: several processes or devices.

    Exactness: losses, parameters and optimizer state bit-identical to the same trainer in memory.

    Example:
        >>> from torchwrap.integrations.transformers.callbacks import OffloadCallback
        >>> callback = OffloadCallback()
    """

    def __init__(self) -> None:
        self._seen: _Figures | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what the trainer would fail at later: replicas of weights that are away."""
        replicas = max(args.world_size, args.n_gpu)
        for handle in _placements(kwargs["model"]) if replicas > 1 else ():
            away = sum(size for tier, size in (handle.tiers() or {}).items() if tier != "device")
            if away:
                _refuse_replicas(type(kwargs["model"]).__name__, replicas, away)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that this can be trained, and tell the optimizer how the trainer goes about it."""
        model: nn.Module = kwargs["model"]
        away = [name for name, parameter in model.named_parameters() if parameter.requires_grad and is_placeholder(parameter.detach())]
        inner = _inner(kwargs.get("optimizer"))
        if away and not _is_offloaded(inner):
            raise ConflictError(
                f"OffloadCallback: {type(inner).__name__} would train {away[0]}, whose weights are away",
                where=away[0],
                fix="Give the trainer an optimizer that can: cls, settings = optimizer_settings(model, args); Trainer(..., "
                "optimizers=(torchwrap.OffloadedOptimizer(model, cls, **settings), None)).",
            )
        if _is_offloaded(inner):
            _configure(inner, args)
            if state.global_step:
                inner.steps = state.global_step  # a checkpoint of the trainer's has replaced whatever the optimizer's folder held
            elif inner.steps and inner.durability != "none":
                warnings.warn(
                    f"the trainer begins at step 0 with weights and optimizer state of {inner.steps} steps, from the optimizer's folder; "
                    "pass resume_from_checkpoint=True to go on, or another path= to begin anew",
                    TorchwrapWarning,
                    stacklevel=2,
                )
        self._seen = _Figures(model, inner)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Commit, so that a crash leaves the state that belongs to the checkpoint."""
        inner = _inner(kwargs.get("optimizer"))
        if _is_offloaded(inner) and inner.durability == "save":
            inner.commit()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures since the last line to it and to the trainer's history."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if logs is None or "loss" not in logs:  # lines of evaluation and of the end have figures of their own
            return
        now, before = _Figures(kwargs["model"], _inner(kwargs.get("optimizer"))), self._seen
        self._seen = now
        if before is None or not now.placed:
            return
        figures = now.since(before)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)  # written before the callbacks are asked


def optimizer_settings(model: nn.Module, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What the trainer would make its optimizer of: `OffloadedOptimizer(model, cls, **settings)` is that one, with its state on the disk.

    Args:
        model: the trainer's, with `requires_grad` as it will be trained.
        args: `optim`, `learning_rate`, `weight_decay`, `adam_beta1` and so on are read.

    Returns:
        The class, and its settings with `params`: one group with decay and one without, as the trainer divides them.

    Raises:
        ConfigError: `args.optim` names something that is no optimizer class of torch.
    """
    from transformers import Trainer  # seconds, and by now the program has loaded it

    trainer: Any = Trainer
    cls, settings = trainer.get_optimizer_cls_and_kwargs(args, model)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or {"params", "model", "optimizer_dict"} & settings.keys():
        raise ConfigError(
            f"optim={getattr(args.optim, 'value', args.optim)!r} is no class that runs by itself",
            where="optim",
            fix='Use optim="adamw_torch_fused".',
        )
    decayed = set(trainer.get_decay_parameter_names(None, model))  # reads nothing of a trainer
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": args.weight_decay},
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return cls, {**settings, "params": groups}


class _Figures:
    """Counters at one moment."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        handles = list(_placements(model))
        self.placed = bool(handles) or _is_offloaded(optimizer)
        stats = [handle.stats() for handle in handles]
        mine = optimizer.stats() if _is_offloaded(optimizer) else {}
        self.read = sum(int(each.get("bytes_read", 0)) for each in [*stats, mine])
        self.written = int(mine.get("bytes_written", 0))
        self.stall_s = sum(float(each.get("stall_s", 0.0)) for each in stats)
        self.at_s = time.monotonic()

    def since(self, before: _Figures) -> dict[str, int | float]:
        elapsed = max(self.at_s - before.at_s, 1e-9)
        return {
            "offload_read_bytes": self.read - before.read,
            "offload_written_bytes": self.written - before.written,
            "offload_stall_share": round(min(1.0, (self.stall_s - before.stall_s) / elapsed), 4),
        }


def _configure(optimizer: Any, args: TrainingArguments) -> None:
    clips = args.max_grad_norm is not None and args.max_grad_norm > 0
    if clips and optimizer.max_grad_norm is not None:
        raise ConfigError(
            f"OffloadCallback: the trainer clips to {args.max_grad_norm} and the optimizer to {optimizer.max_grad_norm}",
            where="max_grad_norm",
            fix="Leave max_grad_norm= out of OffloadedOptimizer; the trainer's is exact on gradients on the disk, too.",
        )
    # The trainer takes the norm of all gradients after every backward, for its log, even if it does not clip.
    optimizer.configure(
        overlap=not clips and not args.fp16,
        accumulate=args.gradient_accumulation_steps,
        gradients="host" if args.fp16 else None,  # a GradScaler writes into gradients
        norms=not clips,
    )


def _refuse_replicas(model: str, replicas: int, away: int) -> None:
    raise UnsupportedModelError(
        f"OffloadCallback: the trainer would make {replicas} replicas of the model and copy the weights of one into the others, and "
        f"{format_bytes(away)} of them are away",
        where=model,
        fix="Train in one process on one device (CUDA_VISIBLE_DEVICES=0), shard with FSDP2 through accelerate instead of offloading, or "
        "write the loop yourself: accelerator.prepare(model) or DistributedDataParallel(model) first, then torchwrap.offload(model), then "
        "OffloadedOptimizer.",
    )


def _is_offloaded(optimizer: Any) -> bool:
    """Whether it updates weights wherever they are and lets a training loop say when."""
    return bool(getattr(optimizer, "steps_absent_weights", False)) and hasattr(optimizer, "configure")


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's."""
    while not _is_offloaded(optimizer) and isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _placements(model: nn.Module) -> Iterator[Handle]:
    """Handles of techniques that place weights, also on a part of the model (peft puts models into others)."""
    for module in model.modules():
        for record in records_of(module).values():
            if record.handle.tiers() is not None:
                yield record.handle


def _planned(model: nn.Module) -> nn.Module:
    """The module that techniques are applied to: the model, or the one inside (peft)."""
    return next((module for module in model.modules() if records_of(module)), model)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _stored_plan(args: TrainingArguments, state: TrainerState) -> Plan | None:
    """The plan of the checkpoint that training goes on from: as the callback kept it, else from a file that somebody put there."""
    kept = state.stateful_callbacks.get(PlanCallback.__name__) if isinstance(state.stateful_callbacks, dict) else None
    kept = kept[0] if isinstance(kept, list) and kept else kept
    text = kept.get("attributes", {}).get("plan") if isinstance(kept, dict) else None
    if isinstance(text, str):
        return Plan.from_json(text)
    folder = _checkpoint(args, state)
    return Plan.load(folder) if (folder / FILE_NAME).is_file() else None


def _compare(stored: Plan, present: Plan, on_difference: str) -> None:
    differences = list(_differences(stored, present))
    if not differences:
        return
    text = "; ".join(text for text, _ in differences)
    if on_difference == "raise" or (on_difference == "auto" and any(matters for _, matters in differences)):
        raise PlanError(
            f"PlanCallback: the model is not what the checkpoint was trained as: {text}",
            where=FILE_NAME,
            fix="Apply the checkpoint's plan before making the trainer (torchwrap.Plan.load(folder).apply(model)), or pass "
            'PlanCallback(on_difference="warn").',
        )
    warnings.warn(f"training goes on with other settings than the checkpoint's: {text}", TorchwrapWarning, stacklevel=2)


def _differences(stored: Plan, present: Plan) -> Iterator[tuple[str, bool]]:
    """(what differs, whether results may)."""
    if stored.model and stored.model != present.model:
        yield f"model {stored.model} is now {present.model}", True
    before: dict[str, Config] = {config.technique: config for config in stored.configs}
    now: dict[str, Config] = {config.technique: config for config in present.configs}
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        matters = not technique_named(name).exactness.startswith("bit-identical")
        if old is None or new is None:
            yield f"{name} {'was not applied' if old is None else 'is not applied now'}", matters
        elif old != new:
            fields, others = old.to_dict(), new.to_dict()
            changed = [f"{key}={fields.get(key)!r} is now {others.get(key)!r}" for key in others if fields.get(key) != others.get(key)]
            yield f"{name}: {', '.join(changed)}", matters
