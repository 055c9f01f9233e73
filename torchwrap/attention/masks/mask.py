"""A mask that is a rule: `TileMask` says which keys a query sees and never holds an Sq x Sk tensor.

The mask is kept as what it means: how far a query looks left and right (causal, window), where a row's keys begin and end (padding), which
tokens belong together (packed sequences), and, for what has no such form, a dictionary of distinct tiles. A rectangle of it is computed
when it is asked for. It is a `torch.Tensor` without storage (see `lazy.py`), because frameworks treat masks as tensors.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, the tiling-mask strategy. There a tile
of a causal mask is a window of one stored triangle; here it is compared from positions, which also serves padding, packing and chunks.
Letters: B batch, H heads (1 when all heads share the mask), Sq queries, Sk keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from torchwrap.attention.masks import packing
from torchwrap.attention.masks.block_mask import block_mask
from torchwrap.attention.masks.dictionary import MaskFunction, compiled, of_dense
from torchwrap.attention.masks.fields import FIELDS, TENSOR_FIELDS, check, device_of, inside, integer, left_of
from torchwrap.attention.masks.lazy import LazyMask, made_dense
from torchwrap.attention.masks.tiles import Spans, Tiles, live_rows, spans, tiles
from torchwrap.attention.transforms import transformed
from torchwrap.core.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["TileMask"]

T = TypeVar("T")


class TileMask(LazyMask):
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

    Example:
        >>> from torchwrap.attention.masks.mask import TileMask
        >>> mask = TileMask.window(1, 65536, 65536, 1024)
        >>> mask.rectangle(0, (4096, 4098), (3072, 3076)).int().tolist()
        [[[0, 1, 1, 1], [0, 0, 1, 1]]]
        >>> int(mask.tiles(128, 128).lo[0, 64])
        56
    """

    right: int | None
    left: int | None
    chunk: int | None  # type: ignore[assignment]  # Tensor.chunk has no meaning for a mask without storage
    shift: torch.Tensor | None
    kv_start: torch.Tensor | None
    kv_end: torch.Tensor | None
    key_mask: torch.Tensor | None
    q_segments: torch.Tensor | None
    k_segments: torch.Tensor | None
    q_offset: int | torch.Tensor
    kv_offset: int

    @staticmethod
    def __new__(
        cls: type[TileMask], batch: int, q_length: int, kv_length: int, *, q_offset: int | torch.Tensor | None = None, kv_offset: int = 0,
        device: torch.device | str | None = None, **conditions: Any,
    ) -> TileMask:
        if torch.compiler.is_compiling() and transformed():  # torch 2.13 copies there what its graph made, as no mask can be copied
            from torchwrap.attention.untraced import end_graph  # slow

            end_graph()
        if isinstance(q_offset, torch.Tensor):
            # Static caches count on in place, and the mask is read after the cache was written.
            q_offset = q_offset.detach().clone()
        batch, q_length, kv_length = integer(batch), integer(q_length), integer(kv_length)
        values = {**dict.fromkeys(FIELDS), **conditions, "q_offset": q_offset, "kv_offset": kv_offset}
        values = {name: integer(value) for name, value in values.items()}
        check(batch, q_length, kv_length, values)
        if q_offset is None:
            values["q_offset"] = values["kv_offset"] + kv_length - q_length
        return cls._of((batch, q_length, kv_length), values, torch.device(device_of(values, device)))

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
        return cls(batch, q_length, kv_length, right=0, left=left_of(window), **options)

    @classmethod
    def padded(
        cls, lengths: Sequence[int] | torch.Tensor, q_length: int, kv_length: int, *, side: str = "left", causal: bool = True,
        device: torch.device | str | None = None, **options: Any,
    ) -> TileMask:
        """A batch whose row b has `lengths[b]` keys at the right end (`side="left"`: padded on the left) or at the left end.

        Raises:
            ConfigError: a length below 0 or above `kv_length`, or an unknown side.
        """
        start, end = packing.of_lengths(lengths, kv_length, side, device)
        return cls(len(start), q_length, kv_length, right=0 if causal else None, kv_start=start, kv_end=end, **options)

    @classmethod
    def from_cu_seqlens(
        cls, q_lengths: torch.Tensor, k_lengths: torch.Tensor | None = None, *, q_length: int | None = None, kv_length: int | None = None,
        causal: bool = True, window: int | None = None,
    ) -> TileMask:
        """Sequences one after the other in one row: B = 1, each sees itself alone; causal rows end where their keys end.

        Args:
            q_lengths: integers [N + 1], cumulative lengths of the queries, from 0.
            k_lengths: those of the keys; None: the same.
            q_length: Sq, if the row is longer than the sequences; what is left over sees nothing.
            kv_length: Sk likewise.
            causal: no query sees a later key of its sequence.
            window: keys that a query sees, its own included.

        Raises:
            ConfigError: not cumulative, or of different count.
        """
        left = None if window is None else left_of(window)
        found = packing.of_cumulative(q_lengths, k_lengths, q_length, kv_length, causal, left)
        function, lengths = found.pop("function", None), (found.pop("q_length"), found.pop("kv_length"))
        if function is not None:
            return cls.from_function(function, 1, *lengths, q_offset=0, device=q_lengths.device, **found)
        return cls(1, *lengths, q_offset=0, **found)

    @classmethod
    def from_position_ids(cls, positions: torch.Tensor, *, causal: bool = True, window: int | None = None) -> TileMask:
        """Rows whose positions begin anew with each packed sequence.

        Args:
            positions: integers [B, S]; a position that is not the one before plus 1 begins a sequence.
            causal: no query sees a later key.
            window: keys that a query sees, its own included.

        Raises:
            ConfigError: not integers of two dimensions.
        """
        numbers = packing.position_segments(positions)
        batch, length = positions.shape
        return cls(
            batch, length, length, right=0 if causal else None, left=None if window is None else left_of(window), q_segments=numbers,
            k_segments=numbers, device=positions.device,
        )

    @classmethod
    def from_function(
        cls, function: MaskFunction, batch: int, q_length: int, kv_length: int, *, heads: int = 1, vmap: bool = False,
        q_offset: int | torch.Tensor | None = None, kv_offset: int = 0, device: torch.device | str | None = None, **conditions: Any,
    ) -> TileMask:
        """Any rule, evaluated once on every pair of positions and kept as distinct tiles.

        Args:
            function: of batch row, head, query position and key position, integer tensors that broadcast; True: visible.
            batch: B.
            q_length: Sq.
            kv_length: Sk.
            heads: H, if the rule looks at the head.
            vmap: call the function on single positions under `torch.vmap`, if it does not broadcast.
            q_offset: as for `TileMask`.
            kv_offset: as for `TileMask`.
            device: where to evaluate.
            conditions: others that have to hold as well, as for `TileMask`.

        Raises:
            ConfigError: the function returns no booleans of such a shape.

        Cost: time O(B * H * Sq * Sk) once; memory 2 bytes per tile of 128 x 128 and 2 KiB per distinct one.
        """
        outline = cls(batch, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, device=device, **conditions)
        queries = torch.arange(q_length, device=outline.device) + outline.q_offset
        keys = torch.arange(kv_length, device=outline.device) + outline.kv_offset
        values = outline._conditions() | {"dictionary": compiled(function, batch, heads, queries, keys, vmap=vmap)}
        return cls._of((batch, q_length, kv_length), values, outline.device)

    @classmethod
    def from_dense(cls, mask: torch.Tensor) -> TileMask:
        """A mask that exists, kept as distinct tiles.

        Args:
            mask: [B or 1, H or 1, Sq, Sk]: bool (True: visible), or floating with nothing but 0 (visible) and -inf or the least number of
                its dtype (hidden).

        Raises:
            ConfigError: not of four dimensions, integers, or other numbers, which are a bias.

        Cost: reads the mask once; at most an eighth of its size as booleans, less where tiles repeat.
        """
        dictionary = of_dense(mask)
        return cls(mask.shape[0], mask.shape[2], mask.shape[3], dictionary=dictionary, device=mask.device)

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
        return self._once("first_query", lambda: int(self.q_offset))

    def key_range(self, b: int) -> tuple[int, int]:
        """Columns [first, end) of batch row b outside which no query sees a key; (0, 0) if there is none.

        Cost: read from the device once for all rows.
        """
        ranges = self._once("key_ranges", self._key_ranges)
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
        visible, column = self._band((r0, r1), (c0, c1))[None, None], torch.arange(c0, c1, device=self.device)
        if self.chunk is not None:
            start = 0 if self.shift is None else _rows(self.shift, chosen)[:, None, None, None]
            queries = torch.arange(r0, r1, device=self.device)[:, None] + self.q_offset - start
            of_key = torch.div(column + self.kv_offset - start, self.chunk, rounding_mode="floor")
            visible = visible & (of_key == torch.div(queries, self.chunk, rounding_mode="floor"))
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

    def _band(self, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """The conditions `right` and `left` alone: bool [rows, columns]."""
        (r0, r1), (c0, c1) = rows, columns
        queries = (torch.arange(r0, r1, device=self.device) + self.q_offset)[:, None]
        keys = torch.arange(c0, c1, device=self.device) + self.kv_offset
        visible = torch.ones((r1 - r0, c1 - c0), dtype=torch.bool, device=self.device)
        if self.right is not None:
            visible &= keys <= queries + self.right
        if self.left is not None:
            visible &= keys >= queries - self.left
        return visible

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

    def spans(self) -> Spans:
        """The columns of each row as intervals, worked out once; see `Spans`."""
        return self._once("spans", lambda: spans(self))

    def tiles(self, bm: int, bn: int) -> Tiles:
        """Which tiles of `bm` rows by `bn` columns are empty, full or partial, worked out once for each size; see `Tiles`.

        Raises:
            ConfigError: a size below 1.
        """
        return self._once(("tiles", bm, bn), lambda: tiles(self, bm, bn))

    def live_rows(self) -> torch.Tensor:
        """bool [B or 1, Sq]: rows that see at least one key (in any head); worked out once."""
        return self._once("live_rows", lambda: live_rows(self))

    def to_cu_seqlens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cumulative lengths of queries and keys, int32 [N + 1] each; bands (causal, window) stay with the caller.

        Raises:
            ConfigError: the mask does not consist of whole sequences one after the other.
        """
        return packing.cumulative_lengths(self)

    def to_block_mask(self, block: int = 128) -> BlockMask:
        """The mask for `torch.nn.attention.flex_attention`, in square blocks, worked out once for each size; see `block_mask`.

        Raises:
            ConfigError: `block` is below 1.
        """
        return self._once(("block_mask", block), lambda: block_mask(self, block))

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> torch.Tensor:
        """The whole mask as a tensor of B x H x Sq x Sk elements; warns and is counted. For tests and for code that knows no better."""
        return made_dense(self, "to_dense").to(dtype or torch.bool)

    def _once(self, name: object, work: Callable[[], T]) -> T:
        if name not in self._found:
            with torch.inference_mode(False):  # kept for later calls, which may be of a training step
                self._found[name] = work()
        value: T = self._found[name]
        return value

    def _cut(self, dim: int, first: int, end: int) -> TileMask | None:
        axis = {0: "batch", 2: "rows", 3: "columns"}.get(dim)
        return None if axis is None else self.sub(**{axis: (first, end)})

    def _whole(self) -> torch.Tensor:
        return self.rectangles((0, self.shape[2]), (0, self.shape[3]))


def _rows(tensor: torch.Tensor, batch: tuple[int, int]) -> torch.Tensor:
    """Some batch rows of a field; a field of one row serves all."""
    return tensor if tensor.shape[0] == 1 else tensor[batch[0] : batch[1]]
