"""Everything a technique is built from: configs, layers, class swapping, order, plans, reports.

The package imports nothing of its own when it is loaded, because `torchwrap.storage` needs `core.errors` without the rest. Names
are looked up on first use. Two packages of this library bear the name of a function (`torchwrap.offload`, `torchwrap.core.tensors`):
importing a submodule makes the import system set the package's attribute to the module, whichever name was there before. A
data descriptor on the package's own class keeps the function in place, in any order of imports (`Package` below).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchwrap.core.tensors import tensors as tensors

__all__ = ["BUILT_IN", "Package", "callable_names", "tensors"]

BUILT_IN = {
    "fast_attention": "torchwrap.fast_attention.technique",
    "offload": "torchwrap.offload.technique",
    "superpipeline": "torchwrap.superpipeline.technique",
    "trace": "torchwrap.trace.technique",
}
"""Techniques of this library and the modules that register them, imported when first asked for."""


class _Callable:
    """A name of a package that is a function or technique, although a submodule has the same name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __get__(self, package: ModuleType | None, owner: type | None = None) -> object:
        return getattr(importlib.import_module(self.module), self.name)

    def __set__(self, package: ModuleType, value: object) -> None:
        # The import system binds a submodule to its parent after running it: that is the one assignment to pass over.
        if not isinstance(value, ModuleType):
            raise AttributeError(f"{package.__name__}.{self.name} cannot be assigned")


class Package(ModuleType):
    """Base of packages with such names; `callable_names` makes the subclass."""


def callable_names(**where: str) -> type[Package]:
    """A package class whose attributes `name` come from the module `where[name]`, also after a submodule of that name is imported."""
    return type("Package", (Package,), {name: _Callable(module, name) for name, module in where.items()})


sys.modules[__name__].__class__ = callable_names(tensors="torchwrap.core.tensors")
