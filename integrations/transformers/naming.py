"""The name under which models find attention of ours, as it stands in their configs."""

from __future__ import annotations

from typing import Any

__all__ = ["NAME", "Name", "implementation_before"]

NAME = "torchwrap_fast"


class Name(str):
    """`NAME` as it stands in the config of a wrapped model. A copy or pickle of the config alone has what stood there before.

    Otherwise a model that is made from a copied config would ask for a function that works for nobody. Where a whole model is copied, its
    route writes the name into the configs of the copy.
    """

    __slots__ = ("original", "routes")

    original: str | None
    routes: int
    """How many wrapped models have this very config."""

    @classmethod
    def put(cls, config: Any) -> None:
        """Write the name into a config."""
        standing = config._attn_implementation_internal
        if not isinstance(standing, cls):
            made = cls(NAME)
            made.original, made.routes = standing, 0
            config._attn_implementation_internal = standing = made
        standing.routes += 1

    @classmethod
    def take(cls, config: Any, original: str | None) -> None:
        """Write back what stood there, unless somebody wrote something else, or another wrapped model has the config."""
        standing = config._attn_implementation_internal
        if isinstance(standing, cls):
            standing.routes -= 1
        if standing == NAME and getattr(standing, "routes", 0) == 0:
            config._attn_implementation_internal = original

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.original

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _same, (self.original,)


def _same(value: str | None) -> str | None:
    return value


def implementation_before(config: Any) -> str | None:
    """The implementation that the config had before any model of it was wrapped."""
    name: str | None = config._attn_implementation_internal
    return name.original if isinstance(name, Name) else name
