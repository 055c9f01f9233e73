"""Keys and values that lie in two memories, as tensors that models can pass on.

A model takes what its cache returns and hands it to its attention function. `TieredTensor` has the shape, dtype and device of all keys (or
values) and no storage; `attend` recognises it and goes to the cache. Operations that only pass a tensor on give it back. Any other gathers
everything on the device first: right, and with a warning, because that is what the two memories were to avoid.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

if TYPE_CHECKING:
    from torchwrap.attention.cooperative.cache import TieredCache

__all__ = ["TieredTensor"]

_aten = torch.ops.aten
_PASSING = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh.default}


class TieredTensor(torch.Tensor):
    """All keys or all values of one layer, `[B, Hkv, S, D]`, as they were when it was made.

    Args:
        cache: that holds them.
        index: of the layer.
        kind: "keys" or "values".

    Attributes:
        materialisations: how often one was gathered on the device because an operation needed its numbers.
    """

    materialisations: ClassVar[int] = 0

    cache: TieredCache
    layer_index: int
    kind: Literal["keys", "values"]
    version: int

    @staticmethod
    def __new__(cls: type[TieredTensor], cache: TieredCache, index: int, kind: Literal["keys", "values"]) -> TieredTensor:
        layer = cache.layers[index]
        batch, heads, width, value_width = layer.shape
        if not heads:
            raise errors.ConfigError("the layer holds nothing yet", where=f"layer {index}", fix="Append keys and values first.")
        shape = batch, heads, layer.length, width if kind == "keys" else value_width
        made: TieredTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=cache.machine.device)
        made.cache, made.layer_index, made.kind, made.version = cache, index, kind, layer.version
        return made

    def attend(
        self, q: torch.Tensor, values: torch.Tensor, *, mask: TileMask | torch.Tensor | None = None, scale: float | None = None,
        softcap: float | None = None, sinks: torch.Tensor | None = None, bias: torch.Tensor | None = None, dropout: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attention over these keys and `values`, as `torchwrap.attention.attend.attend` has it.

        Raises:
            ConfigError: `values` are of another layer, or tokens were added since, or q asks for gradients.
            UnsupportedModelError: a bias, dropout, or a mask of floats.
            WorkError: the host's part failed.
        """
        here = f"layer {self.layer_index}"
        other = (values.cache, values.layer_index, values.kind) if isinstance(values, TieredTensor) else None
        if other != (self.cache, self.layer_index, "values") or self.kind != "keys":
            raise errors.ConfigError("keys and values are not of one layer", where=here, fix="Pass on what the cache's update returned.")
        self._check_current()
        if bias is not None or dropout or (mask is not None and mask.dtype != torch.bool):
            given = "bias" if bias is not None else "dropout" if dropout else "a mask of floats"
            raise errors.UnsupportedModelError(
                f"a cache with tokens on the host does not serve {given}", where=here, fix="Use a cache on one device for this model."
            )
        if mask is not None and not isinstance(mask, TileMask):
            mask = TileMask.from_dense(mask.expand(*mask.shape[:-2], q.shape[2], self.shape[2]))
        return self.cache.attend(self.layer_index, q, mask=mask, scale=scale, softcap=softcap, sinks=sinks)

    def gathered(self) -> torch.Tensor:
        """All of it in one tensor on the device; counted, and warned of once for each cache."""
        return self._gathered("gathered")

    def _gathered(self, operation: str) -> torch.Tensor:
        self._check_current()
        TieredTensor.materialisations += 1
        self.cache.gathers += 1
        if self.cache.gathers == 1:
            warnings.warn(
                f"{operation} on the {self.kind} of layer {self.layer_index} gathers {self.nbytes} bytes on {self.device}, part of which "
                "was on the host to save just that; so will others of this cache. Let all attention of the model go through torchwrap: "
                "torchwrap.fast_attention(model), and calls that do not ask for weights (output_attentions).",
                errors.TorchwrapWarning,
                stacklevel=4,
            )
        return self.cache.layers[self.layer_index].gathered(self.kind)

    def _again(self) -> TieredTensor:
        made = TieredTensor(self.cache, self.layer_index, self.kind)
        made.version = self.version
        return made

    def _check_current(self) -> None:
        if self.version != self.cache.layers[self.layer_index].version:
            raise errors.ConfigError(
                f"these {self.kind} were handed out before the cache changed", where=f"layer {self.layer_index}",
                fix="Use what the last update returned.",
            )  # fmt: skip

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing must not gather anything
        return f"TieredTensor({list(self.shape)}, {self.kind} of layer {self.layer_index})"

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        tensor = args[0] if args else None
        if isinstance(tensor, TieredTensor) and (func in _PASSING or _is_whole_slice(func, tensor, args)):
            return tensor._again()  # autograd does not take the same object back
        leaves, layout = tree_flatten((args, options))
        leaves = [leaf._gathered(str(func)) if isinstance(leaf, TieredTensor) else leaf for leaf in leaves]
        args, options = tree_unflatten(leaves, layout)
        return func(*args, **options)


def _is_whole_slice(func: Any, tensor: TieredTensor, args: tuple[Any, ...]) -> bool:
    """`tensor[..., 0:all]`, which models write to be rid of what a static cache has behind its tokens."""
    if func is not _aten.slice.Tensor:
        return False
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, end, step = (*args[1:], *defaults[len(args) - 1 :])
    return (start or 0) == 0 and step == 1 and (end is None or end >= tensor.shape[dim])
