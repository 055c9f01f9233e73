"""Attributes that a model assigns to its modules while it runs, kept apart for several calls under way at once.

Some models leave a note for their next step in an attribute (the position offsets of a multimodal prompt, say). With calls taking turns,
one would read another's note. So what a call assigned is put away when its turn ends and comes back with its next turn: each call sees
the model as it was at first, and its own notes. Tensors written in place (running statistics) are shared, as they are by calls one after
another.

Only modules that can have run since are looked at. When a new name turns up in them all others are too, and the hooks of all modules:
who notes that it installed its hooks must find them when it finds the note, and not find them when it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

from torch import nn

__all__ = ["Assigned", "Attributes", "put"]

_GONE = object()

_HOOKS = [name for name, value in nn.Module().__dict__.items() if isinstance(value, dict) and name not in ("_parameters", "_buffers")]
"""Dictionaries that torch itself gives every module, and changes in place."""

Assigned = list[tuple["_Table", dict[str, Any]]]
"""What one call assigned: by table, name to value."""


class Attributes:
    """The attributes of a model's modules as they were.

    Args:
        model: the model.
        inside: the module of each unit, by its index.

    Cost: comparing the attributes outside of the units, and those of one unit, each time that the turn changes.
    """

    def __init__(self, model: nn.Module, inside: Mapping[int, nn.Module]) -> None:
        self._inside = {unit: [table for module in root.modules() for table in _tables(module)] for unit, root in inside.items()}
        seen = {id(module) for root in inside.values() for module in root.modules()}
        self._outside = [table for module in model.modules() if id(module) not in seen for table in _tables(module)]
        self._hooks = [
            _Table(module.__dict__[name]) for module in model.modules() for name in _HOOKS if isinstance(module.__dict__.get(name), dict)
        ]

    def take(self, units: Iterable[int], before: Assigned) -> Assigned:
        """Take away what was assigned since, and return it.

        Args:
            units: begun since.
            before: what the same call had assigned when its turn began.
        """
        known = {(id(table), name) for table, values in before for name in values}
        run = [table for unit in dict.fromkeys(units) for table in self._inside.get(unit, ())]
        assigned = _taken([*self._outside, *run, *(table for table, _ in before)])
        if any((id(table), name) not in known for table, values in assigned for name in values):
            assigned += _taken([*(table for tables in self._inside.values() for table in tables), *self._hooks])
        return assigned


def put(assigned: Assigned) -> None:
    """Let the modules have these attributes."""
    for table, values in assigned:
        table.put(values)


def _taken(tables: Iterable[_Table]) -> Assigned:
    found = ((table, table.take()) for table in tables if not table.is_as_it_was())
    return [(table, values) for table, values in found if values]


def _tables(module: nn.Module) -> tuple[_Table, _Table]:
    return _Table(module.__dict__), _Table(module._buffers)


class _Table:
    """One dictionary: a module's `__dict__`, or its buffers."""

    __slots__ = ("_names", "_table", "_values")

    def __init__(self, table: dict[str, Any]) -> None:
        self._table = table
        self._note()

    def _note(self) -> None:
        self._names, self._values = list(self._table), list(self._table.values())

    def is_as_it_was(self) -> bool:
        return len(self._table) == len(self._values) and all(map(is_, self._table.values(), self._values))

    def take(self) -> dict[str, Any]:
        before = dict(zip(self._names, self._values, strict=True))
        changed = {name: value for name, value in self._table.items() if before.get(name, _GONE) is not value}
        changed.update({name: _GONE for name in before if name not in self._table})
        self.put({name: before.get(name, _GONE) for name in changed})
        self._note()  # the same values, perhaps in another order
        return changed

    def put(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is _GONE:
                self._table.pop(name, None)
            else:
                self._table[name] = value
