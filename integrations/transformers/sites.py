"""Which modules of a model ask transformers' registry for their attention, and which models cannot be led elsewhere."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.swap import original_class

__all__ = ["asks_the_registry", "can_be_set", "code_of", "refuse", "with_nested"]


def refuse(fqn: str, model: Any) -> None:
    """Raise `UnsupportedModelError` for a model whose attention cannot be set, or that always returns its weights."""
    kind = original_class(model)
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(
            f"{kind.__name__} is configured to return the weights of attention in every call, which no fast way of computing it has",
            where=fqn or kind.__name__,
            fix="Set model.config.output_attentions = False first.",
        )
    if not can_be_set(kind):
        raise UnsupportedModelError(
            f"the attention of {kind.__name__} cannot be set: its code does not ask transformers' AttentionInterface",
            where=fqn or kind.__name__,
            fix="Apply fast_attention to the parts whose attention can be set, e.g. torchwrap.fast_attention(model.language_model), "
            "or leave it out: apply(model, ..., strict=False) goes on without it.",
        )


def can_be_set(kind: type) -> bool:
    """Does the code of this model class ask the registry, or have no attention of its own?

    The same question as `PreTrainedModel._can_set_attn_implementation` (transformers 5.23), which reads source files and leaves its
    answer on the class.
    """
    scope = vars(sys.modules.get(kind.__module__, object))
    if "ALL_ATTENTION_FUNCTIONS" in scope:
        return True
    own = (value for value in scope.values() if isinstance(value, type) and value.__module__ == kind.__module__)
    return bool(scope) and not any(nn.Module in value.__bases__ and "Attention" in value.__name__ for value in own)


def asks_the_registry(module: nn.Module) -> bool:
    """Does the module's own code look its attention function up?"""
    code = getattr(code_of(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def code_of(module: nn.Module) -> Any:
    """The module's `forward` as its author wrote it."""
    return inspect.unwrap(original_class(module).forward)


def with_nested(config: Any) -> Iterator[Any]:
    """A config and those in it, of towers and the like."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        nested = getattr(config, name, None)
        if hasattr(nested, "_attn_implementation_internal"):
            yield from with_nested(nested)
