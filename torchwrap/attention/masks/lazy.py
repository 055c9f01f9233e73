"""A tensor that has a shape and no storage: what passes it on gets it back, whatever else touches it gets a dense one, with a warning.

Frameworks treat masks as tensors: generation with static caches calls `.contiguous()` on them, device maps call `.to()`, models cut
them to the length of the cache. A wrapper subclass answers these without making the mask.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchwrap.attention.masks.dictionary import TileDictionary
from torchwrap.attention.masks.fields import FIELDS
from torchwrap.attention.transforms import beneath
from torchwrap.core.errors import ConfigError, TorchwrapWarning

__all__ = ["LazyMask", "made_dense"]

Self = TypeVar("Self", bound="LazyMask")

_aten = torch.ops.aten
# Operations that hand the mask on as it is; `contiguous` never arrives here, since the strides already are.
_PASSING = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh.default}
# Operations by which masks of 0 and the least number are used; one of booleans would give 0 and 1, and nothing would be hidden. Only in a
# sum with scores is it known what the mask is to be: it is made so.
_ADDING = {_aten.add.Tensor, _aten.add_.Tensor, _aten.add.out}
_TAKING = {*_ADDING, _aten.sub.Tensor, _aten.sub_.Tensor, _aten.sub.out, _aten.rsub.Tensor}
_SCALING = {_aten.mul.Tensor, _aten.mul.Scalar, _aten.mul.out}


class LazyMask(torch.Tensor):
    """A bool tensor [B, 1 or H, Sq, Sk] that consists of its conditions; see `TileMask`, the only class made of it.

    Attributes:
        materialisations: how often a dense mask was made in this process, for tests.
    """

    materialisations: ClassVar[int] = 0

    dictionary: TileDictionary | None
    _found: dict[Any, Any]

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def _of(cls: type[Self], lengths: tuple[int, int, int], values: dict[str, Any], device: torch.device) -> Self:
        if torch.compiler.is_dynamo_compiling():  # torch 2.13 can take a subclass apart there, but not make one
            from torchwrap.attention.untraced import untraced  # slow

            made: Self = untraced(cls._of, lengths, values, device)
            return made
        batch, q_length, kv_length = lengths
        dictionary = values["dictionary"]
        shape = (batch, 1 if dictionary is None else dictionary.heads, q_length, kv_length)
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        for name, value in values.items():
            setattr(mask, name, beneath(value) if isinstance(value, torch.Tensor) else value)
        mask._found = {}
        return mask

    @property
    def _lengths(self) -> tuple[int, int, int]:
        return self.shape[0], self.shape[2], self.shape[3]

    def _conditions(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def _map(self: Self, change: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> Self:
        """This mask with every tensor in it changed."""
        values = self._conditions()
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = change(value)
            elif isinstance(value, TileDictionary):
                values[name] = value.map(change)
        return self._of(self._lengths, values, device)

    def _cut(self: Self, dim: int, first: int, end: int) -> Self | None:
        """The part [first, end) of one dimension as a mask; None if there is no such mask."""
        raise NotImplementedError

    def _whole(self) -> torch.Tensor:
        """The dense mask."""
        raise NotImplementedError

    # What torch.compile asks of a tensor that consists of tensors: their names, and the rest as values that compare.

    @property
    def _codes(self) -> torch.Tensor | None:
        return None if self.dictionary is None else self.dictionary.codes

    @property
    def _bits(self) -> torch.Tensor | None:
        return None if self.dictionary is None else self.dictionary.tiles

    @property
    def _nothing(self) -> torch.Tensor:
        # torch 2.13 takes a subclass apart only if there is a tensor in it, and masks such as causal ones have none.
        return cast(torch.Tensor, self._found.setdefault("nothing", torch.empty(0, device=self.device)))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [name for name in (*FIELDS, "_codes", "_bits") if isinstance(getattr(self, name), torch.Tensor)]
        rest = tuple((name, value) for name, value in self._conditions().items() if name not in (*names, "dictionary"))
        layout = None if self.dictionary is None else (self.dictionary.block, self.dictionary.start)
        return names or ["_nothing"], (rest, layout, self.device)

    @classmethod
    def __tensor_unflatten__(cls: type[Self], inner: dict[str, Any], context: tuple[Any, ...], size: Any, stride: Any) -> Self:
        rest, layout, device = context
        values = dict.fromkeys(FIELDS) | dict(rest) | {name: inner[name] for name in FIELDS if name in inner}
        if layout is not None:
            values["dictionary"] = TileDictionary(block=layout[0], start=layout[1], codes=inner["_codes"], tiles=inner["_bits"])
        mask = cls._of((size[0], size[2], size[3]), values, device)
        mask._found.update({"nothing": inner["_nothing"]} if "_nothing" in inner else {})
        return mask

    def _stable_hash_for_caching(self) -> str:
        """Key of compiled graphs on disk: what the graph depends on, which is no number in a tensor."""
        names, context = self.__tensor_flatten__()
        tensors = [(name, part.dtype, part.shape, part.stride()) for name in names for part in (getattr(self, name),)]
        return hashlib.sha256(repr((self.shape, context, tensors)).encode()).hexdigest()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing must not make the mask dense
        values = {name: value for name, value in self._conditions().items() if value is not None}
        tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
        given = [f"{name}={value}" for name, value in values.items() if name not in tensors]
        return f"TileMask({list(self.shape)}, {', '.join(given + tensors)})"

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _no_writing("mask[...] = ...")

    def share_memory_(self: Self) -> Self:
        """Moves what the mask holds to shared memory, for other processes; returns the mask."""
        self._map(lambda tensor: tensor.share_memory_(), self.device)
        return self

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self._map(lambda tensor: copy.deepcopy(tensor, memo), self.device)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, (type(self), self._lengths, self._conditions(), self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if args and isinstance(args[0], LazyMask) and (passed := _passed(func, args, options)) is not None:
            return passed
        _refuse_writing(func, args, options)
        scores = _scores(func, args)
        if scores is None:
            _refuse_arithmetic(func, args)
        leaves, layout = tree_flatten((args, options))
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, LazyMask):
                seen = made_dense(leaf, str(func))
                leaves[index] = seen if scores is None else _hiding(seen, scores)
        args, options = tree_unflatten(leaves, layout)
        return func(*args, **options)


def _passed(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What an operation gives that only hands its first argument, a mask, on, or that consists of others; None for all others."""
    mask: LazyMask = args[0]
    # In inference mode, operations that consist of others arrive whole.
    if (whole := func.decompose(*args, **options)) is not NotImplemented:
        return whole
    # A view of a tensor made outside inference mode is no inference tensor, in whatever mode it is taken.
    with torch.inference_mode(mask.is_inference()):
        if func in _PASSING:
            same = mask._map(lambda tensor: tensor, mask.device)
            same._found = mask._found
            return same
        if func is _aten._to_copy.default and options.get("dtype") in (None, torch.bool):
            device = torch.device(options.get("device") or mask.device)
            return mask._map(lambda tensor: tensor.to(device, non_blocking=options.get("non_blocking", False)), device)
        return _sliced(mask, *args[1:]) if func is _aten.slice.Tensor else None


def _refuse_writing(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    # The operation would write into a dense copy and hand the mask back as it was.
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else options.get(argument.name)
        if isinstance(value, LazyMask) and argument.alias_info is not None and argument.alias_info.is_write:
            raise _no_writing(str(func))


def _scores(func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """What a mask is added to, if that are scores: models' own attention does so, and finishes calls that began before an undo."""
    if func not in _ADDING or len(args) < 2:
        return None
    other = next((one for one in args[:2] if not isinstance(one, LazyMask)), None)
    return other if isinstance(other, torch.Tensor) and other.is_floating_point() and other.dim() else None


def _hiding(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A mask as transformers' eager attention adds it."""
    return torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, torch.finfo(scores.dtype).min)


def _refuse_arithmetic(func: Any, args: tuple[Any, ...]) -> None:
    # A factor that is a tensor of weights is none of this: hidden ones become 0.
    others = [value for value in args[:2] if not isinstance(value, LazyMask)]
    floating = any(value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float) for value in others)
    scalar = all(not isinstance(value, torch.Tensor) or value.dim() == 0 for value in others)
    if floating and (func in _TAKING or (func in _SCALING and scalar)):
        raise ConfigError(
            f"{func} uses a mask of booleans as if it were one of 0 and -inf: it would hide nothing", where="TileMask",
            fix="Use scores.masked_fill(~mask, -math.inf), or leave a model whose code does this out of fast_attention.",
        )  # fmt: skip


def _no_writing(operation: str) -> ConfigError:
    return ConfigError(
        f"{operation} would write into a mask that consists of conditions",
        where="TileMask",
        fix="Write into mask.to_dense(), or make another TileMask.",
    )


def _sliced(mask: LazyMask, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> LazyMask | None:
    """`mask[..., start:end]` as a mask, for models that cut masks to the cache's length."""
    first, last, _ = slice(start, end).indices(mask.shape[dim])
    return mask._cut(dim % 4, first, max(first, last)) if step == 1 else None


def made_dense(mask: LazyMask, operation: str) -> torch.Tensor:
    """The dense mask, with a warning that names the operation, and counted."""
    LazyMask.materialisations += 1
    warnings.warn(
        f"{operation} on a TileMask made the whole mask, {list(mask.shape)} elements. Pass the mask on as it is, or read "
        "mask.rectangle(...) tile by tile.",
        TorchwrapWarning,
        stacklevel=3,
    )
    return mask._whole()


def _restore(cls: type[LazyMask], lengths: tuple[int, int, int], values: dict[str, Any], device: torch.device) -> LazyMask:
    return cls._of(lengths, values, device)
