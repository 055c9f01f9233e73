"""A mask that is a rule: `TileMask` says which keys a query sees and never holds an Sq x Sk tensor.

The mask is kept as what it means: how far a query looks left and right (causal, window), where a row's keys begin and end (padding), which
tokens belong together (packed sequences), and, for what has no such form, a dictionary of distinct tiles. A rectangle of it is computed
when it is asked for. It is a `torch.Tensor` without storage because frameworks treat masks as tensors: generation with static caches
calls `.contiguous()` on them, device maps call `.to()`. Operations that only pass the mask on give a mask; any other gives a dense
tensor, warns, and is counted in `TileMask.materialisations`.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, the tiling-mask strategy (block masks
as shifted windows of one small triangle); padding, packing, chunks and the dictionary are ours.
Letters: B batch, H heads (1 when all heads share the mask), Sq queries, Sk keys.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchwrap.attention.fields import FIELDS, TENSOR_FIELDS, Dictionary, check, device_of, inside
from torchwrap.core.errors import ConfigError, TorchwrapWarning

__all__ = ["TileMask"]

_aten = torch.ops.aten
# Operations that hand the mask on as it is; `contiguous` never arrives here, since the strides already are.
_PASSING = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh.default}


class TileMask(torch.Tensor):
    """Which key columns each query row may see, as conditions that are evaluated tile by tile.

    Query row i stands at position `q_offset + i`, key column j at `kv_offset + j`. In batch row b the query sees the key if every given
    condition holds. Masks are immutable: treat all fields as read-only.

    Args:
        batch, q_length, kv_length: B, Sq, Sk. A mask of B = 1 serves any batch.
        right: key position <= query position + right (0: causal). Not negative.
        left: key position >= query position - left (a window of W keys is left = W - 1). Not negative.
        chunk: both positions, less `shift`, lie in one chunk of so many tokens.
        shift: int32 [B], first position of the chunks; None: 0.
        kv_start, kv_end: int32 [B], the columns `kv_start <= j < kv_end` hold keys; None: all.
        key_mask: bool [B, Sk], columns that hold keys, for padding with holes.
        q_segments, k_segments: int32 [B, Sq] and [B, Sk]; only tokens of equal number see each other.
        dictionary: any other condition, from `from_function` or `from_dense`.
        q_offset: an integer, or a 0-dim integer tensor (static caches), which is copied; None: kv_offset + Sk - Sq, the last queries.
        kv_offset: position of the first key column.
        device: None: that of the tensors given, else the CPU.

    Raises:
        ConfigError: a negative length, window or chunk; a tensor of the wrong shape, dtype or device; only one of the segments.

    Cost: the tensors given, 4 to 16 bytes per token; nothing of Sq x Sk.
    """

    materialisations: ClassVar[int] = 0

    right: int | None
    left: int | None
    chunk: int | None  # type: ignore[assignment]  # Tensor.chunk has no meaning for a mask without storage
    shift: torch.Tensor | None
    kv_start: torch.Tensor | None
    kv_end: torch.Tensor | None
    key_mask: torch.Tensor | None
    q_segments: torch.Tensor | None
    k_segments: torch.Tensor | None
    dictionary: Dictionary | None
    q_offset: int | torch.Tensor
    kv_offset: int
    _found: dict[Any, Any]

    @staticmethod
    def __new__(
        cls: type[TileMask], batch: int, q_length: int, kv_length: int, *, q_offset: int | torch.Tensor | None = None, kv_offset: int = 0,
        device: torch.device | str | None = None, **conditions: Any,
    ) -> TileMask:
        if isinstance(q_offset, torch.Tensor):
            # Static caches count on in place, and the mask is read after the cache was written.
            q_offset = q_offset.detach().clone()
        elif q_offset is None:
            q_offset = kv_offset + kv_length - q_length
        values = {**dict.fromkeys(FIELDS), **conditions, "q_offset": q_offset, "kv_offset": kv_offset}
        check(batch, q_length, kv_length, values)
        return cls._of((batch, q_length, kv_length), values, torch.device(device_of(values, device)))

    @classmethod
    def _of(cls, lengths: tuple[int, int, int], values: dict[str, Any], device: torch.device) -> TileMask:
        batch, q_length, kv_length = lengths
        dictionary = values["dictionary"]
        shape = (batch, 1 if dictionary is None else dictionary.heads, q_length, kv_length)
        mask: TileMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        for name, value in values.items():
            setattr(mask, name, value)
        mask._found = {}
        return mask

    # Making one

    @classmethod
    def full(cls, batch: int, q_length: int, kv_length: int, **options: Any) -> TileMask:
        """Every query sees every key. Options: `q_offset`, `kv_offset`, `device` and any other condition."""
        return cls(batch, q_length, kv_length, **options)

    @classmethod
    def causal(cls, batch: int, q_length: int, kv_length: int, **options: Any) -> TileMask:
        """Every query sees its own key and those before it; without `q_offset` the last query is at the last key."""
        return cls(batch, q_length, kv_length, right=0, **options)

    @classmethod
    def window(cls, batch: int, q_length: int, kv_length: int, window: int, **options: Any) -> TileMask:
        """Every query sees the last `window` keys, its own included: positions q - window + 1 to q.

        Raises:
            ConfigError: `window` is no positive integer.
        """
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ConfigError(f"A window of {window!r} keys", where="TileMask.window", fix="Give a positive number of keys.")
        return cls(batch, q_length, kv_length, right=0, left=window - 1, **options)

    @classmethod
    def padded(
        cls, lengths: Sequence[int] | torch.Tensor, q_length: int, kv_length: int, *, side: str = "left", causal: bool = True,
        device: torch.device | str | None = None, **options: Any,
    ) -> TileMask:
        """A batch whose row b has `lengths[b]` keys at the right end (`side="left"`: padded on the left) or at the left end.

        Raises:
            ConfigError: a length below 0 or above `kv_length`, or an unknown side.
        """
        numbers = torch.as_tensor(lengths, dtype=torch.int32, device=device)
        if side not in ("left", "right") or numbers.dim() != 1 or bool(((numbers < 0) | (numbers > kv_length)).any()):
            raise ConfigError(
                f"Lengths {numbers.tolist()} padded on side {side!r} to {kv_length} keys", where="TileMask.padded",
                fix='Give one length of 0 ... kv_length per batch row, and side="left" or "right".',
            )
        zero, end = torch.zeros_like(numbers), torch.full_like(numbers, kv_length)
        start, end = (end - numbers, end) if side == "left" else (zero, numbers)
        return cls(len(numbers), q_length, kv_length, right=0 if causal else None, kv_start=start, kv_end=end, **options)

    # Reading it

    @property
    def plain(self) -> str | None:
        """`"full"`, `"causal"` (right = 0 alone) or `"window"` (any other band) if only `right` and `left` act; None otherwise."""
        if self.chunk is not None or self.dictionary is not None or any(getattr(self, name) is not None for name in TENSOR_FIELDS):
            return None
        if self.left is None and self.right in (None, 0):
            return "full" if self.right is None else "causal"
        return "window"

    def first_query(self) -> int:
        """Position of query row 0 as an integer; read from the device once if it is a tensor."""
        if "first_query" not in self._found:
            self._found["first_query"] = int(self.q_offset)
        return int(self._found["first_query"])

    def key_range(self, b: int) -> tuple[int, int]:
        """Columns [first, end) of batch row b outside which no query sees a key; (0, 0) if there is none.

        Cost: read from the device once for all rows.
        """
        if "key_ranges" not in self._found:
            self._found["key_ranges"] = self._key_ranges()
        ranges: list[tuple[int, int]] = self._found["key_ranges"]
        return ranges[b if len(ranges) > 1 else 0]

    def _key_ranges(self) -> list[tuple[int, int]]:
        low, high = 0, self.shape[3]
        # Columns are positions less kv_offset; the first and the last query bound the band.
        shift = self.first_query() - self.kv_offset
        if self.left is not None:
            low = max(low, shift - self.left)
        if self.right is not None:
            high = min(high, shift + self.shape[2] - 1 + self.right + 1)
        starts = [0] if self.kv_start is None else self.kv_start.tolist()
        ends = [self.shape[3]] if self.kv_end is None else self.kv_end.tolist()
        count = max(len(starts), len(ends))
        pairs = zip(starts * (count // len(starts)), ends * (count // len(ends)), strict=True)
        bounded = [(max(low, start), min(high, end)) for start, end in pairs]
        return [(first, end) if first < end and self.shape[2] else (0, 0) for first, end in bounded]

    def rectangle(self, b: int, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """The mask of batch row b in rows [rows[0], rows[1]) and columns [columns[0], columns[1]).

        Returns:
            bool [1 or H, rows, columns], computed now.

        Raises:
            ConfigError: outside the mask.

        Cost: one byte per element and temporaries of one to eight bytes per element of the rectangle; nothing is read from the device.
        """
        if not 0 <= b < self.shape[0] and self.shape[0] != 1:
            raise ConfigError(f"Batch row {b} of a mask of {self.shape[0]}", where="TileMask.rectangle")
        b = b if self.shape[0] > 1 else 0
        return self.rectangles(rows, columns, batch=(b, b + 1))[0]

    def rectangles(self, rows: tuple[int, int], columns: tuple[int, int], *, batch: tuple[int, int] | None = None) -> torch.Tensor:
        """As `rectangle`, of the batch rows [batch[0], batch[1]) (None: all): bool [rows of the batch, 1 or H, rows, columns]."""
        chosen = inside("batch", batch or (0, self.shape[0]), self.shape[0])
        (r0, r1), (c0, c1) = inside("rows", rows, self.shape[2]), inside("columns", columns, self.shape[3])
        queries = (torch.arange(r0, r1, device=self.device) + self.q_offset)[:, None]
        keys = torch.arange(c0, c1, device=self.device) + self.kv_offset
        visible = torch.ones((1, 1, r1 - r0, c1 - c0), dtype=torch.bool, device=self.device)
        if self.right is not None:
            visible = visible & (keys <= queries + self.right)
        if self.left is not None:
            visible = visible & (keys >= queries - self.left)
        if self.chunk is not None:
            start = 0 if self.shift is None else _rows(self.shift, chosen)[:, None, None, None]
            chunk_of_key = torch.div(keys - start, self.chunk, rounding_mode="floor")
            visible = visible & (chunk_of_key == torch.div(queries - start, self.chunk, rounding_mode="floor"))
        column = torch.arange(c0, c1, device=self.device)
        if self.kv_start is not None:
            visible = visible & (column >= _rows(self.kv_start, chosen)[:, None, None, None])
        if self.kv_end is not None:
            visible = visible & (column < _rows(self.kv_end, chosen)[:, None, None, None])
        if self.key_mask is not None:
            visible = visible & _rows(self.key_mask, chosen)[:, None, None, c0:c1]
        if self.q_segments is not None and self.k_segments is not None:
            same = _rows(self.q_segments, chosen)[:, r0:r1, None] == _rows(self.k_segments, chosen)[:, None, c0:c1]
            visible = visible & same[:, None]
        if self.dictionary is not None:
            visible = visible & self.dictionary.rectangles(chosen, (r0, r1), (c0, c1))
        return visible.expand(chosen[1] - chosen[0], -1, -1, -1)

    def sub(  # type: ignore[override]  # Tensor.sub: booleans cannot be subtracted
        self, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None, batch: tuple[int, int] | None = None
    ) -> TileMask:
        """The mask of a rectangle (and of some batch rows) as a mask of its own: positions stay, columns count from its first.

        Raises:
            ConfigError: outside the mask.
        """
        b0, b1 = inside("batch", batch or (0, self.shape[0]), self.shape[0])
        r0, r1 = inside("rows", rows or (0, self.shape[2]), self.shape[2])
        c0, c1 = inside("columns", columns or (0, self.shape[3]), self.shape[3])
        values = self._conditions()
        for name in TENSOR_FIELDS:
            if values[name] is not None:
                values[name] = _rows(values[name], (b0, b1))
        for name in ("kv_start", "kv_end"):
            if values[name] is not None:
                values[name] = (values[name] - c0).clamp(0, c1 - c0)
        for name, (first, end) in (("key_mask", (c0, c1)), ("q_segments", (r0, r1)), ("k_segments", (c0, c1))):
            if values[name] is not None:
                values[name] = values[name][:, first:end]
        if self.dictionary is not None:
            values["dictionary"] = self.dictionary.sub((b0, b1), (r0, r1), (c0, c1))
        values["q_offset"], values["kv_offset"] = self.q_offset + r0, self.kv_offset + c0
        return self._of((b1 - b0, r1 - r0, c1 - c0), values, self.device)

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> torch.Tensor:
        """The whole mask as a tensor of B x H x Sq x Sk elements; warns and is counted. For tests and for code that knows no better."""
        return _dense(self, "to_dense", dtype or torch.bool)

    # Being a tensor

    def _conditions(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> TileMask:
        """This mask with every tensor in it changed."""
        values = self._conditions()
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = change(value)
            elif name == "dictionary" and value is not None:
                values[name] = value.map(change)
        return self._of((self.shape[0], self.shape[2], self.shape[3]), values, device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing must not make the mask dense
        values = {name: value for name, value in self._conditions().items() if value is not None}
        tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
        given = [f"{name}={value}" for name, value in values.items() if name not in tensors]
        return f"TileMask({list(self.shape)}, {', '.join(given + tensors)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> TileMask:
        return self._map(lambda tensor: copy.deepcopy(tensor, memo), self.device)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, ((self.shape[0], self.shape[2], self.shape[3]), self._conditions(), self.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        mask = args[0] if args else None
        if isinstance(mask, TileMask):
            if func in _PASSING:
                return mask._map(lambda tensor: tensor, mask.device)
            if func is _aten._to_copy.default and options.get("dtype") in (None, torch.bool):
                device = torch.device(options.get("device") or mask.device)
                return mask._map(lambda tensor: tensor.to(device, non_blocking=options.get("non_blocking", False)), device)
            if func is _aten.slice.Tensor and (part := _sliced(mask, *args[1:])) is not None:
                return part
        leaves, layout = tree_flatten((args, options))
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, TileMask):
                leaves[index] = _dense(leaf, str(func), torch.bool)
        args, options = tree_unflatten(leaves, layout)
        return func(*args, **options)


def _rows(tensor: torch.Tensor, batch: tuple[int, int]) -> torch.Tensor:
    """Some batch rows of a field; a field of one row serves all."""
    return tensor if tensor.shape[0] == 1 else tensor[batch[0] : batch[1]]


def _sliced(mask: TileMask, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> TileMask | None:
    """`mask[..., start:end]` as a mask, so that models that cut masks to the cache's length keep them; None along the heads."""
    axis = {0: "batch", 2: "rows", 3: "columns"}.get(dim % 4)
    if axis is None or step != 1:
        return None
    first, last, _ = slice(start, end).indices(mask.shape[dim])
    return mask.sub(**{axis: (first, max(first, last))})


def _dense(mask: TileMask, operation: str, dtype: torch.dtype) -> torch.Tensor:
    TileMask.materialisations += 1
    warnings.warn(
        f"{operation} on a TileMask made the whole mask, {list(mask.shape)} elements. Pass the mask on as it is, or read "
        "mask.rectangle(...) tile by tile.", TorchwrapWarning, stacklevel=3,
    )
    return mask.rectangles((0, mask.shape[2]), (0, mask.shape[3])).to(dtype)


def _restore(lengths: tuple[int, int, int], values: dict[str, Any], device: torch.device) -> TileMask:
    return TileMask._of(lengths, values, device)
