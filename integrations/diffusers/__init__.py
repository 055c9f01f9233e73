"""torchwrap's knowledge of diffusers: how the attention of its networks is reached.

Networks keep the calculation of attention in processors, one class per network, which all end in torch's `scaled_dot_product_attention`:
directly, or through `dispatch_attention_fn` with the native back end, the default. So modules that own a processor run with those calls
led elsewhere, whatever the processor does before and after, and no processor is exchanged. Importing this package imports no diffusers.
Tested versions: README.md.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import AttentionRoute, Integration
from torchwrap.core.swap import original_class

__all__ = ["DiffusersIntegration", "integration"]

ENDS = ("scaled_dot_product_attention", "dispatch_attention_fn")


class DiffusersIntegration(Integration):
    """Answers the core's questions about diffusers models; blocks and the rest are read from the module tree."""

    name = "diffusers"
    tested: ClassVar[dict[str, tuple[str, str]]] = {"diffusers": ("0.42", "0.42")}

    def matches(self, model: nn.Module) -> bool:
        """True if the model derives from diffusers' `ModelMixin`."""
        return any(kind.__name__ == "ModelMixin" and kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)

    def attention(self, model: nn.Module, service: Any, prefix: str = "") -> AttentionRoute | None:
        """Layers for every module with an attention processor.

        Raises:
            UnsupportedModelError: a processor computes attention in another way.
        """
        from torchwrap.attention.divert import FunctionLayer

        found = AttentionRoute()
        for fqn, module in model.named_modules(prefix=prefix):
            processor = getattr(module, "processor", None)
            if processor is None or not original_class(module).__module__.startswith("diffusers."):
                continue
            code = getattr(inspect.unwrap(type(processor).__call__), "__code__", None)
            backend = getattr(processor, "_attention_backend", None)
            if not set(ENDS) & set(getattr(code, "co_names", ())) or getattr(backend, "value", "native") != "native":
                raise UnsupportedModelError(
                    f"{type(processor).__name__} computes attention by something else than torch's scaled_dot_product_attention"
                    + (f" (attention back end {backend.value!r})" if backend is not None else ""),
                    where=fqn,
                    fix='Call model.set_attention_backend("native") first.' if backend is not None else _instead(type(processor).__name__),
                )
            found.places.append((fqn, module, FunctionLayer(fqn, service)))
            found.attends.append(fqn)
        if found.attends:
            found.notes.append(f"{len(found.attends)} modules with attention processors")
        return found


def _instead(name: str) -> str:
    """What to do about a processor of this name; another one is recommended only where it computes the same."""
    from diffusers.models import attention_processor

    other = name.removeprefix("Sliced").removeprefix("XFormers") + "2_0"
    if hasattr(attention_processor, other):
        return f"Call model.set_attn_processor({other}()) first, from diffusers.models.attention_processor."
    return "Apply fast_attention to parts of the model that have none of it."


integration: DiffusersIntegration = DiffusersIntegration()
