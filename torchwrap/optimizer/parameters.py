"""The parameters of one optimizer: which there are, what they are called, where each is, and that nobody else drives them.

A name is the first that the model has for a parameter, wherever it occurs; commits are found by it. Two optimizers on one parameter would
take each other's stand-ins for gradients, so the second one is refused until the first is closed or gone.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.tensors import data_of, is_placeholder
from torchwrap.optimizer import refused
from torchwrap.optimizer.elementwise import Rule, settings_of
from torchwrap.optimizer.targets import Target, can_stream
from torchwrap.stream.units import Unit
from torchwrap.weights.handle import WeightsHandle

__all__ = ["Parameters", "listed"]

_driven: weakref.WeakSet[Parameters] = weakref.WeakSet()


class Parameters:
    """The parameters of one optimizer.

    Args:
        model: names them.
        handle: of the offloaded model, if it is one.
        rule: the wrapped class.

    Attributes:
        targets: in the order of their groups.
    """

    def __init__(self, model: nn.Module, handle: WeightsHandle | None, rule: Rule) -> None:
        named = list(model.named_parameters(remove_duplicate=False))
        self._names = {id(parameter): name for name, parameter in reversed(named)}
        places = Counter(id(parameter) for _, parameter in named)
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
        # A table that is a head's weight too gets a dense gradient.
        sparse = Counter(id(table.weight) for table in tables if table.sparse)
        self._sparse = {table for table, count in sparse.items() if count == places[table]}
        self._places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        self._handle, self._rule = handle, rule
        self.targets: list[Target] = []
        self._switches: list[dict[str, object]] = []

    @property
    def streamed(self) -> list[Target]:
        """Those whose state is in the store between steps."""
        return [target for target in self.targets if target.streamed]

    def add(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The parameters of the last group."""
        handle = self._handle
        for parameter in groups[-1]["params"]:
            piece = handle.piece_of(parameter) if handle is not None else None
            name = self._names.get(id(parameter)) or f"parameter {len(self.targets)}"
            unit: Unit | None = None
            if handle is not None and piece is not None:
                mine = [unit for unit in handle.units if any(other is piece for other in unit.pieces)]
                unit = next((unit for unit in mine if unit.kind != "rows"), mine[0] if mine else None)
            layout, streamed = self._layout(parameter, groups[-1]), can_stream(parameter, piece)
            place = self._places.get(id(parameter), len(self._places))
            self.targets.append(Target(name, parameter, len(groups) - 1, place, piece, unit, layout, streamed=streamed))

    def drop(self, number: int) -> None:
        """Those of the last group, of this number, are none after all."""
        self.targets[:] = [target for target in self.targets if target.group != number]

    def lay_out(self, groups: Sequence[Mapping[str, Any]], state: Mapping[torch.Tensor, Mapping[str, Any]] | None) -> Callable[[], None]:
        """What the class keeps of each, with the present settings; calling what is returned undoes that.

        Args:
            groups: of the optimizer.
            state: replaces what was kept so far, and what the settings do not need of it is kept as well; None: nothing does, and what is
                not needed any more stays as it is. Both are as in torch.

        Raises:
            ConfigError: the class is not elementwise with them; nothing is changed.
        """
        before = [(target, target.layout) for target in self.targets], self._switches
        layouts = [self._layout(target.parameter, groups[target.group]) for target in self.targets]
        for target, layout in zip(self.targets, layouts, strict=True):
            found = _with_kept(layout, target) if state is None else self._with_loaded(layout, target, state.get(target.parameter, {}))
            target.layout = found
        self._switches = [_switches(group) for group in groups]

        def undo() -> None:
            for target, layout in before[0]:
                target.layout = layout
            self._switches = before[1]

        return undo

    def adapt(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """The same between two steps, where a setting went from or to zero, or is switched on or off; whether one was.

        Raises:
            ConfigError: the class needs more of a parameter than it has kept of it so far; nothing is changed.
        """
        switches = [_switches(group) for group in groups]
        if switches == self._switches:
            return False
        layouts = [self._layout(target.parameter, groups[target.group]) for target in self.targets]
        for target, layout in zip(self.targets, layouts, strict=True):
            lacking = next((name for name in layout if name not in target.layout), None)
            if target.streamed and target.order and lacking is not None:
                raise errors.ConfigError(
                    f"OffloadedOptimizer: with these settings {self._rule.cls.__name__} needs {lacking!r} of {target.name}, which was not "
                    "kept in the steps so far",
                    where=f"param_groups[{target.group}]",
                    fix="Set them back. Settings that change what is kept (amsgrad, centered) belong in the constructor.",
                )
        for target, layout in zip(self.targets, layouts, strict=True):
            target.layout = _with_kept(layout, target)
        self._switches = switches
        return True

    def _layout(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        counts = parameter.is_floating_point() or parameter.is_complex()
        if not parameter.requires_grad and (not counts or parameter.element_size() == 1):
            return {}  # integers and float8 hold a quantised weight, never get a gradient, and no class could step them
        return dict(self._rule.layout(settings_of(group), parameter.dtype, parameter.device))

    def _with_loaded(self, layout: Mapping[str, torch.dtype], target: Target, entries: Mapping[str, Any]) -> dict[str, torch.dtype]:
        """Momenta that are not needed with these settings are kept per element too: they may be needed again."""
        casts = target.parameter.is_floating_point() and not getattr(self._rule.cls, "has_masters", False)
        more = {
            key: target.parameter.dtype if casts else value.dtype
            for key, value in entries.items()
            if isinstance(value, torch.Tensor) and value.shape == target.parameter.shape and value.numel() > 1
        }
        return {**more, **layout}

    def checked(self, groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The same groups; `ConflictError` if somebody put other parameters into them, for which there are no hooks and no room."""
        listed = [parameter for group in groups for parameter in group["params"]]
        mine = [target.parameter for target in self.targets]
        if len(listed) != len(mine) or any(a is not b for a, b in zip(listed, mine, strict=True)):
            raise errors.ConflictError(
                "OffloadedOptimizer: the parameters in param_groups are not those that it was made with",
                where="param_groups",
                fix="Make a new one for other parameters, or use add_param_group(). Leave some out with requires_grad_(False).",
            )
        return groups

    # -- who drives them -----------------------------------------------------------------------------------------------------------------

    def check_usable(self, parameters: Iterable[Any]) -> None:
        """Raise `ConflictError` if the weight of one of these, or of a (name, parameter), is away and the handle does not know where;
        `ConfigError` if one is there twice, which torch would step twice, with a warning; `UnsupportedModelError` if its gradient will be
        sparse and its state is to be streamed: a backward that finds out has updated others by then."""
        seen: set[int] = set()
        for number, entry in enumerate(parameters):
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, torch.Tensor) and id(parameter) in seen:
                name = self._names.get(id(parameter)) or f"parameter {number}"
                raise errors.ConfigError(f"OffloadedOptimizer: {name} is twice in one group", where=name, fix="Leave one of the two out.")
            seen.add(id(parameter))
            piece = self._handle.piece_of(parameter) if self._handle is not None and isinstance(parameter, torch.Tensor) else None
            if id(parameter) in self._sparse and parameter.requires_grad and can_stream(parameter, piece):
                raise refused.sparse(self._names[id(parameter)])
            if not isinstance(parameter, torch.Tensor) or not is_placeholder(data_of(parameter)):
                continue
            if piece is None:
                name = self._names.get(id(parameter)) or f"parameter {number}"
                raise errors.ConflictError(
                    f"OffloadedOptimizer: the weights of {name} are away, with another part of the model that was wrapped by itself",
                    where=name,
                    fix="Make one optimizer for each part: OffloadedOptimizer(part, ...). Or unwrap the parts and wrap the whole model.",
                )

    def check_free(self, parameters: Iterable[Any]) -> None:
        """Raise `ConflictError` if another optimizer drives one of these parameters, or (name, parameter)."""
        wanted = {id(parameter[1] if isinstance(parameter, tuple) else parameter) for parameter in parameters}
        for again in (False, True):
            taken = (t.name for other in list(_driven) if other is not self for t in other.targets if id(t.parameter) in wanted)
            name = next(taken, None)
            if name is None:
                return
            if not again:
                gc.collect()  # one that is only in a cycle drives nothing
        raise errors.ConflictError(
            f"OffloadedOptimizer: another one drives {name} already", where=name or "", fix="Call close() on the old optimizer first."
        )

    def take(self) -> None:
        """From now on they are driven, by whoever keeps this object."""
        _driven.add(self)

    def let_go(self) -> None:
        """Another optimizer may have them. Idempotent."""
        _driven.discard(self)


def listed(parameters: Any) -> Any:
    """The parameters of a group, of which a caller may give one or an iterator."""
    if isinstance(parameters, set):
        return parameters  # torch refuses it: a set has no order
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _with_kept(layout: Mapping[str, torch.dtype], target: Target) -> dict[str, torch.dtype]:
    return {**layout, **{name: kind for name, kind in target.layout.items() if name in target.order or not target.streamed}}


def _switches(group: Mapping[str, Any]) -> dict[str, object]:
    """What of the settings may say what a class keeps: whether numbers are zero, and everything else that is no tensor."""
    found: dict[str, object] = {}
    for name, value in settings_of(group).items():
        found[name] = bool(value) if isinstance(value, int | float) else None if isinstance(value, torch.Tensor | tuple | list) else value
    return found
