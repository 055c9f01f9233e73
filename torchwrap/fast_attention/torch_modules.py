"""Attention that torch itself has modules or functions for: `nn.MultiheadAttention` with the layers around it, and modules of the user's.

In eval mode torch may run these modules as one native function that no attention function of ours could enter, switched by a flag that is
global to the process. So the flag is left alone, and the modules' code is replaced: the projections are computed as torch's own slow
path does, and attention between them is ours. An encoder layer is run step by step through its own methods; an encoder does not turn
padded batches into nested tensors, for which there is the native path only. A module of any library whose own `forward` calls
`scaled_dot_product_attention` runs with those calls led here.

Letters: B batch, T and S query and key lengths, E width of the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchwrap.attention.contract import SMALL
from torchwrap.attention.divert import FunctionLayer
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.masks.packing import key_conditions
from torchwrap.attention.service import Service
from torchwrap.attention.transforms import is_mapped
from torchwrap.core.integration import AttentionRoute
from torchwrap.core.layer import Layer
from torchwrap.core.swap import layers_of, original_class

__all__ = ["EncoderLayer", "MultiheadLayer", "StackLayer", "route"]


SWITCH = "fused_attn"
"""What vision networks call the attribute by which their code chooses torch's function; some of their modules have it off (timm 1.0)."""


def route(model: nn.Module, service: Service, taken: set[int]) -> AttentionRoute:
    """Layers for every module of these classes, or of one that did not write their `forward` anew.

    Args:
        model: the model.
        service: who computes attention.
        taken: ids of modules that an integration serves already.
    """
    found = AttentionRoute()
    for fqn, module in model.named_modules():
        if id(module) in taken:
            continue
        forward = original_class(module).forward
        if forward is nn.MultiheadAttention.forward:
            found.places.append((fqn, module, MultiheadLayer(fqn, service)))
            found.attends.append(fqn)
        elif forward is nn.TransformerEncoderLayer.forward:
            step = getattr(module._sa_block, "__func__", None)
            found.places.append((fqn, module, EncoderLayer(fqn, service, added=step is not nn.TransformerEncoderLayer._sa_block)))
        elif forward is nn.TransformerEncoder.forward:
            found.places.append((fqn, module, StackLayer(fqn, service)))
        elif "scaled_dot_product_attention" in (names := getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())):
            off = SWITCH in names and getattr(module, SWITCH, None) is False
            found.places.append((fqn, module, FunctionLayer(fqn, service, SWITCH if off else "")))
            found.attends.append(fqn)
    if not found.attends:
        found.places.clear()
    return found


def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the parameters behind `self`, and what those are that may be left out."""
    found = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(one.name for one in found), {one.name: one.default for one in found if one.default is not inspect.Parameter.empty}


_PARAMETERS = {
    forward: _parameters(forward)
    for forward in (nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
}


class _Replacing(Layer):
    """A layer in place of a module's code."""

    def __init__(self, fqn: str, service: Service) -> None:
        self.fqn: str = fqn
        self.service: Service = service

    def _named(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults filled in; the user's own mistakes raise as they would."""
        names, defaults = _PARAMETERS[forward]
        positional = dict(zip(names, args, strict=False))
        given = {**defaults, **positional, **kwargs}
        if len(given) != len(names) or len(args) > len(names) or positional.keys() & kwargs.keys():
            inspect.signature(forward).bind(None, *args, **kwargs)  # raises
        return given


class MultiheadLayer(_Replacing):
    """`nn.MultiheadAttention.forward` with attention of ours, where no weights are asked for."""

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `nn.MultiheadAttention.forward`; the weights it returns are None."""
        assert isinstance(module, nn.MultiheadAttention)
        given = self._named(nn.MultiheadAttention.forward, args, kwargs)
        query, key, value = given["query"], given["key"], given["value"]
        if given["is_causal"] and given["attn_mask"] is None:
            return call(*args, **kwargs)  # a hint about a mask that is missing: torch says so
        reason = _not_served(module, query, key, value, given)
        if reason is not None:
            self.service.leave(self.fqn, *reason)
            return call(*args, **kwargs)
        if not _fits(module, query, key, value, given):
            return call(*args, **kwargs)  # torch says what is wrong with it
        flat = query.dim() == 2
        q, k, v = _projected(module, query, key, value)
        mask, bias = _masks(q.shape, k.shape, given)
        dropout = module.dropout if module.training else 0.0
        out = self.service.attend(self.fqn, q, k, v, mask=mask, bias=bias, dropout=dropout)
        rows = out.transpose(1, 2) if flat or module.batch_first else out.permute(2, 0, 1, 3)
        out = F.linear(rows.flatten(2), module.out_proj.weight, module.out_proj.bias)
        return (out.squeeze(0) if flat else out), None


def _not_served(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> tuple[str, str] | None:
    """Why this call goes to torch, and what can be done about it."""
    if given["need_weights"]:
        return "nn.MultiheadAttention returns the weights of attention", "Call it with need_weights=False, if they are not used."
    if query.is_nested or key.is_nested or value.is_nested:
        return "its inputs are nested tensors", "Give padded tensors with key_padding_mask."
    if any(mask is not None and is_mapped(mask) for mask in (given["key_padding_mask"], given["attn_mask"])):
        return "its masks are mapped over by torch.func.vmap", "Nothing has to be done."
    if module.bias_k is not None or module.add_zero_attn:
        return "nn.MultiheadAttention adds keys of its own (add_bias_kv, add_zero_attn)", "Nothing has to be done."
    return None


def _fits(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> bool:
    """Do all shapes and the kinds of the masks go together as torch wants them? Attention alone would broadcast some that do not."""
    tensors = (query, key, value)
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim() or key.shape[:-1] != value.shape[:-1]:
        return False
    if tuple(x.shape[-1] for x in tensors) != (module.embed_dim, module.kdim, module.vdim):
        return False
    along = 0 if query.dim() == 2 or not module.batch_first else 1
    rows, columns, batch = query.shape[along], key.shape[along], 1 if query.dim() == 2 else query.shape[1 - along]
    if query.dim() == 3 and key.shape[1 - along] != batch:
        return False
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    heads = batch * module.num_heads
    return (padding is None or (_is_mask(padding) and tuple(padding.shape) == ((columns,) if query.dim() == 2 else (batch, columns)))) and (
        mask is None or (_is_mask(mask) and tuple(mask.shape) in ((rows, columns), (heads, rows, columns)))
    )


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, H, S, D)."""
    if query is key is value and module.in_proj_weight is not None:
        qkv = F.linear(query, module.in_proj_weight, module.in_proj_bias)
        qkv = qkv.view(*qkv.shape[:-1], 3, module.num_heads, module.head_dim)
        if query.dim() == 2:
            qkv = qkv.unsqueeze(0)
        q, k, v = qkv.permute((2, 0, 3, 1, 4) if module.batch_first or query.dim() == 2 else (2, 1, 3, 0, 4)).unbind(0)
        return q, k, v
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    parts = tuple(F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True))
    heads = []
    for part in parts:
        if part.dim() == 2:
            part = part.unsqueeze(0)
        elif not module.batch_first:
            part = part.transpose(0, 1)
        heads.append(part.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2))
    return heads[0], heads[1], heads[2]


def _masks(q_shape: torch.Size, k_shape: torch.Size, given: dict[str, Any]) -> tuple[TileMask | Tensor | None, Tensor | None]:
    """What hides keys and what is added to scores; torch's boolean masks say what is hidden, ours what is seen."""
    batch, heads, rows, columns = *q_shape[:3], k_shape[2]
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    bias: Tensor | None = None
    conditions: dict[str, Any] = {}
    if padding is not None:
        padding = padding.view(-1, columns)
        # With gradients, and in a graph, a rule is less work than a tensor.
        small = padding.is_cpu and max(rows, columns) <= SMALL and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if padding.dtype == torch.bool and mask is None and small:
            return ~padding[:, None, None, :], None
        if padding.dtype == torch.bool:
            # Where rows begin and end is read from the tensor, which a graph cannot do, and which pays for what is not small.
            long = padding.is_cpu and max(rows, columns) > SMALL
            read = long and not (torch.compiler.is_compiling() or is_mapped(padding))
            conditions.update(key_conditions(~padding) if read else {"key_mask": ~padding})
        else:
            bias = padding[:, None, None, :]
    # torch's own contract: with the hint the mask is a causal one. One that learns has a gradient, which a rule has not.
    if mask is not None and given["is_causal"] and not mask.requires_grad:
        conditions["right"] = 0
        mask = None
    if mask is not None:
        mask = mask.view(batch, heads, rows, columns) if mask.dim() == 3 else mask[None, None]
        if mask.dtype != torch.bool:
            bias = mask if bias is None else bias + mask
        elif padding is not None and padding.dtype == torch.bool:
            return ~mask & ~padding[:, None, None, :], bias
        else:
            return ~mask, bias
    if not conditions:
        return None, bias
    device = next((value.device for value in (padding, given["attn_mask"]) if value is not None), None)
    return TileMask(batch, rows, columns, q_offset=0, device=device, **conditions), bias


class EncoderLayer(_Replacing):
    """`nn.TransformerEncoderLayer.forward` step by step, never as one native function.

    Args:
        fqn: name of the module.
        service: who computes attention.
        added: whether the step around attention is a user's code, which knows masks of floats only.
    """

    def __init__(self, fqn: str, service: Service, *, added: bool) -> None:
        super().__init__(fqn, service)
        self.added: bool = added

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `nn.TransformerEncoderLayer.forward`."""
        assert isinstance(module, nn.TransformerEncoderLayer)
        given = self._named(nn.TransformerEncoderLayer.forward, args, kwargs)
        x = given["src"]
        if x.is_nested or not any(isinstance(layer, MultiheadLayer) for layer in layers_of(module.self_attn)):
            return call(*args, **kwargs)
        mask, padding = given["src_mask"], given["src_key_padding_mask"]
        if self.added:
            mask, padding = _added(mask, x.dtype), _added(padding, x.dtype)
        if module.norm_first:
            x = x + module._sa_block(module.norm1(x), mask, padding, is_causal=given["is_causal"])
            return x + module._ff_block(module.norm2(x))
        x = module.norm1(x + module._sa_block(x, mask, padding, is_causal=given["is_causal"]))
        return module.norm2(x + module._ff_block(x))


class StackLayer(_Replacing):
    """`nn.TransformerEncoder.forward` without nested tensors."""

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `nn.TransformerEncoder.forward`."""
        assert isinstance(module, nn.TransformerEncoder)
        given = self._named(nn.TransformerEncoder.forward, args, kwargs)
        x, masks, causal = given["src"], [given["mask"], given["src_key_padding_mask"]], given["is_causal"]
        if x.is_nested:
            return call(*args, **kwargs)
        if causal is None:
            causal = masks[0] is not None and _is_causal(masks[0])
        written = [not any(isinstance(one, EncoderLayer) for one in layers_of(layer)) for layer in module.layers]
        added = [_added(mask, x.dtype) for mask in masks] if any(written) else masks
        for layer, own in zip(module.layers, written, strict=True):
            mask, padding = added if own else masks
            x = layer(x, src_mask=mask, is_causal=causal is True, src_key_padding_mask=padding)
        return x if module.norm is None else module.norm(x)


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as torch hands it to code inside its layers, which users may have written: of floats, to be added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _is_causal(mask: Tensor) -> bool:
    """Is it the mask of `nn.Transformer.generate_square_subsequent_mask`, as torch looks for when it is not told?"""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or not _is_mask(mask):
        return False
    future = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, future)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(future, float("-inf")))
