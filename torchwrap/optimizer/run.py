"""The run that an optimizer is part of: what it keeps for each parameter, taken from a state dict, committed, and given back.

What is kept of a streamed parameter lies in the store (chunks.py writes it there); of one that stays in memory an ordinary optimizer keeps
it (resident.py), and only a commit copies it to the store. A commit is both with the weights, the settings and the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.elementwise import Rule
from torchwrap.optimizer.persist import describe_run, from_json
from torchwrap.optimizer.resident import Resident
from torchwrap.optimizer.targets import Target, in_place, records_needed
from torchwrap.optimizer.values import Values
from torchwrap.storage.generations import GenerationStore

__all__ = ["Run", "matched"]


class Run:
    """What is kept of the parameters of one optimizer, and its commits.

    Args:
        rule: the wrapped class.
        targets: all parameters of the optimizer; the list may grow.
        store: holds the records, and what was committed.
        values: moves weights and state into the store and out of it.
        resident: keeps the state of what stays in memory.
        chunk: bytes of a parameter updated at a time.
    """

    def __init__(self, rule: Rule, targets: list[Target], store: GenerationStore, values: Values, resident: Resident, chunk: int) -> None:
        self._rule, self._targets, self._store = rule, targets, store
        self._values, self._resident, self._chunk = values, resident, chunk

    def reserve(self, loaded: Mapping[torch.Tensor, Any] = MappingProxyType({}), *, whole: bool) -> None:
        """Room in the store for what is trained by now.

        Args:
            loaded: state that is to be kept, of parameters that may not be trained (any more).
            whole: also for parameters that stay in memory, so that they can be committed.

        Raises:
            DiskFullError: there is none.
            UnsupportedModelError: a weight that is streamed in tiles is trained.
        """
        trained = [t for t in self._targets if t.parameter.requires_grad or t.parameter.grad is not None]  # torch steps what has a gradient
        wanted = [t for t in trained if t.parameter.numel() and (whole or t.streamed)]
        for target in wanted:
            if target.away and target.piece is not None and target.piece.tiles:
                raise errors.UnsupportedModelError(
                    f"OffloadedOptimizer: {target.name} is streamed in tiles, which cannot be trained: its gradient is as large as it is "
                    "whole, and that of its input, a sum over tiles, is not that of training in memory",
                    where=target.name,
                    fix="Freeze it with requires_grad_(False), or offload the model without tile_above= and with room for it whole.",
                )
        wanted += [target for target in self._targets if target.streamed and loaded.get(target.parameter) and target not in wanted]
        self._store.reserve(record for target in wanted for record in records_needed(target, self._chunk, self._store))

    def state_of(self, target: Target, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the class keeps of a parameter, by name; before a step with `settings` what it begins with, which is nothing for most."""
        if not target.streamed:
            return self._resident.state(target)
        return target.state(self._store) or self._rule.initial(settings, target.parameter)

    def load(self, groups: Sequence[Mapping[str, Any]], state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Replace what is kept, cast as torch's own `load_state_dict` casts it; also of parameters that are not trained (any more).

        Args:
            groups: of the optimizer.
            state: what is to be kept of each parameter, by name; there is room for it, see `reserve`.

        Raises:
            ConfigError: the state is not that of this class with these settings.
        """
        for target in self._targets:
            self._load(target, groups[target.group], state.get(target.parameter, {}))

    def _load(self, target: Target, settings: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
        plain: dict[str, Any] = {}
        casts = target.parameter.is_floating_point() and not getattr(self._rule.cls, "has_masters", False)
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and key == "step":
                on_device = settings.get("capturable") or settings.get("fused")
                value = value.to(dtype=torch.float32, device=target.parameter.device) if on_device else value
            elif isinstance(value, torch.Tensor) and not (target.streamed and key in target.layout):
                dtype = target.layout.get(key, target.parameter.dtype if casts else value.dtype)
                value = value.to(dtype=dtype, device=target.parameter.device)
            plain[key] = value
        if target.streamed:
            self._values.load_state(target, plain)
        else:
            self._resident.set_state(target, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in plain.items()})

    # -- generations ---------------------------------------------------------------------------------------------------------------------

    def commit(self, groups: Sequence[Mapping[str, Any]], steps: int) -> None:
        """Make everything as it is now what a crash leaves.

        Raises:
            ConfigError: a setting is of a kind that cannot be stored.
            StorageError: it failed; the commit before is what a crash leaves.
        """
        kept: dict[str, dict[str, Any]] = {}
        for target in self._targets:
            state = target.order if target.streamed else self._resident.state(target)
            if target.parameter.numel() and (target.parameter.requires_grad or target.changed or state):
                self._store.reserve(records_needed(target, self._chunk, self._store))
                self._values.save_weight(target)
                if not target.streamed:
                    self._values.save_whole(target, self._resident.state(target))
                kept[target.name] = {"order": list(target.order), "numbers": target.numbers}
        self._store.commit(describe_run(self._rule.cls, self._targets, kept, groups, steps))

    def restore_settings(self, groups: Sequence[dict[str, Any]]) -> int:
        """Put the committed settings into `groups`; how many steps had been taken."""
        run = self._store.run
        for group, settings in zip(groups, run["groups"], strict=True):  # type: ignore[arg-type]
            group.update(from_json(settings))
        return int(run["steps"])  # type: ignore[arg-type]

    def restore_values(self) -> None:
        """Make the committed weights the model's, and the committed state what is kept.

        Raises:
            StorageError: a parameter was not trained then and is now.
            CorruptDataError: what was stored is not what was written.
        """
        kept = {name: from_json(numbers) for name, numbers in self._store.run["kept"].items()}  # type: ignore[union-attr]
        for target in self._targets:
            found = kept.get(target.name)
            if found is None and target.changed:
                raise errors.StorageError(
                    f"{target.name} was not trained at the last commit and is now", where=target.name, fix="Load a checkpoint."
                )
            entries = found or {"order": [], "numbers": {}}
            target.order, target.numbers, target.torn = tuple(entries["order"]), in_place(target.numbers, entries["numbers"]), False
            for key in (key for key in target.order if key not in target.numbers):  # also what is not needed with these settings
                target.layout.setdefault(key, self._store.records[target.state_name(key)].dtype)
            if found is not None:
                self._values.restore_weight(target)
                if not target.streamed:
                    self._resident.set_state(target, self._values.restored_whole(target))


def matched(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], targets: Sequence[Target]
) -> tuple[list[dict[str, Any]], dict[torch.Tensor, dict[str, Any]]]:
    """Groups and states of a state dict, for the parameters of this optimizer instead of numbers.

    Raises:
        ValueError: it has other groups, in torch's words.
    """
    saved: list[dict[str, Any]] = deepcopy(state_dict["param_groups"])
    if len(saved) != len(groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(old["params"]) != len(new["params"]) for old, new in zip(saved, groups, strict=True)):
        raise ValueError("loaded state dict contains a parameter group that doesn't match the size of optimizer's group")
    numbered = [number for group in saved for number in group["params"]]
    entries: dict[torch.Tensor, dict[str, Any]] = {
        target.parameter: dict(state_dict["state"][number])
        for target, number in zip(targets, numbered, strict=True)
        if number in state_dict["state"]
    }
    for old, group in zip(saved, groups, strict=True):
        old["params"] = group["params"]
    return saved, entries
