"""What the code of an attention module does with its mask, and with the keys and values that its cache returns: read from its source.

Nothing is called. A module whose source is not to be had is taken to do nothing of the kind.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

__all__ = ["computes_with_what_a_cache_returns", "joins_numbers_to_its_mask"]

_ABOUT = ("shape", "dtype", "device", "size", "ndim", "dim")
"""What may be asked of keys that lie on two sides, without having them in one piece."""


@lru_cache(maxsize=256)
def _parsed(forward: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])


def joins_numbers_to_its_mask(forward: Any) -> bool:
    """Does it lengthen its mask by others, cast to the mask's dtype? Those are 0 and -inf, of which booleans say the opposite.

    Args:
        forward: of the module, as its author wrote it.
    """
    return any(
        isinstance(one, ast.Attribute) and one.attr == "dtype" and isinstance(one.value, ast.Name) and one.value.id == "attention_mask"
        for call in _calls(_parsed(forward), "cat")
        for one in ast.walk(call)
    )


def computes_with_what_a_cache_returns(forward: Any) -> bool:
    """Does it compute others from the keys and values of all tokens, before or beside attention?

    Args:
        forward: of the module, as its author wrote it.
    """
    tree = _parsed(forward)
    calls = list(_calls(tree, "update"))
    stores = [one for one in ast.walk(tree) if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Tuple)]
    updates = [one for one in stores if any(call is one.value for call in calls)]
    if not updates:
        return False
    names = {one.id for update in updates for one in ast.walk(update.targets[0]) if isinstance(one, ast.Name)}
    later = [one for one in ast.walk(tree) if getattr(one, "lineno", 0) > min(update.lineno for update in updates)]
    within = {id(one) for update in updates for one in ast.walk(update)}
    return any(_changes(one, names) for one in later if id(one) not in within)


def _changes(node: ast.AST, names: set[str]) -> bool:
    """`x = f(x)`, `x.f()` or `torch.f(x)`."""

    def named(one: ast.AST) -> bool:
        return isinstance(one, ast.Name) and one.id in names

    if isinstance(node, ast.Assign) and any(named(one) for target in node.targets for one in ast.walk(target)):
        return isinstance(node.value, ast.Call) and any(named(one) for one in ast.walk(node.value))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    outermost: ast.AST = node.func
    while isinstance(outermost, ast.Attribute):
        outermost = outermost.value
    if named(outermost):
        return named(node.func.value) and node.func.attr not in _ABOUT
    return isinstance(outermost, ast.Name) and outermost.id in ("torch", "F", "nn") and any(named(one) for one in node.args)


def _calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of a method or function of this name behind a dot."""
    for one in ast.walk(tree):
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == name:
            yield one
