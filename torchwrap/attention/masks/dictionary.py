"""Masks without a closed form, kept as distinct tiles: a map of small numbers, and one bit per element of each tile that occurs.

Any function of indices, or a mask that exists, is looked at one stripe of tiles at a time. Empty and full tiles become the numbers 0 and
1; of the others only distinct ones are stored, in bits. Block structure (images in text, prefixes, documents) repeats its tiles, so the
dictionary stays small; a mask of noise costs an eighth of its size as booleans.
Letters: B batch, H heads, Sq queries, Sk keys, BM x BN a tile, nq and nk tiles along queries and keys, N distinct tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchwrap.attention.transforms import beneath, outside_of_transforms
from torchwrap.core.errors import ConfigError

__all__ = ["MaskFunction", "TileDictionary", "compiled", "of_dense"]

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of batch row, head, query position and key position (integer tensors that broadcast): bool, whether the query sees the key."""

_BLOCK = (128, 128)
_STRIPE = 1 << 18  # elements evaluated together: 256 KiB of booleans, 2 MiB of positions
_EMPTY, _FULL = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TileDictionary:
    """The tiles of a mask.

    Attributes:
        block: (BM, BN), BN a multiple of 8.
        codes: int16 or int32 [B or 1, H or 1, nq, nk], row of `tiles` for each tile.
        tiles: uint8 [N + 2, BM, BN / 8], 8 columns in a byte, the leftmost in the lowest bit; the first two are empty and full.
        start: row and column of the first element inside the first tile, for rectangles of a larger mask.
    """

    block: tuple[int, int]
    codes: Tensor
    tiles: Tensor
    start: tuple[int, int] = (0, 0)

    @property
    def heads(self) -> int:
        """1 if all heads share the mask, else H."""
        return self.codes.shape[1]

    @property
    def batch(self) -> int:
        """1 if all batch rows share the mask, else B."""
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the map and the tiles."""
        return self.codes.nbytes + self.tiles.nbytes

    def rectangles(self, batch: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """bool [batch rows or 1, H or 1, rows, columns].

        Cost: one byte per element of the tiles touched.
        """
        part = self.sub(batch, rows, columns)
        (bm, bn), (r0, c0) = self.block, part.start
        count, heads, down, across = part.codes.shape
        packed = part.tiles[part.codes.long()].permute(0, 1, 2, 4, 3, 5).reshape(count, heads, down * bm, across * bn // 8)
        bits = torch.arange(8, dtype=torch.uint8, device=self.device)
        dense = ((packed[..., None] >> bits) & 1).bool().flatten(-2)
        return dense[..., r0 : r0 + rows[1] - rows[0], c0 : c0 + columns[1] - columns[0]]

    def sub(self, batch: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> TileDictionary:
        """A rectangle of it, with indices of its own; the tiles are shared."""
        (i0, i1, r0), (j0, j1, c0) = (
            (low // size, -(-high // size), low % size) if high > low else (0, 0, 0)
            for low, high, size in (
                (begin + first, begin + end, size)
                for (first, end), begin, size in zip((rows, columns), self.start, self.block, strict=True)
            )
        )
        chosen = self.codes if self.batch == 1 else self.codes[batch[0] : batch[1]]
        return replace(self, codes=chosen[:, :, i0:i1, j0:j1], start=(r0, c0))

    def map(self, change: Callable[[Tensor], Tensor]) -> TileDictionary:
        """The same with both tensors changed."""
        return replace(self, codes=change(self.codes), tiles=change(self.tiles))

    def classes(self, q_length: int, kv_length: int, bm: int, bn: int) -> tuple[Tensor, Tensor]:
        """Tiles of another size, judged by the tiles here that they touch.

        Returns:
            bool [B or 1, nq, nk] twice: may hold a visible key in some head; holds nothing but visible keys, in all heads.
        """
        some = _touched((self.codes != _EMPTY).any(1), self, q_length, kv_length, bm, bn)
        every = ~_touched((self.codes != _FULL).any(1), self, q_length, kv_length, bm, bn)
        # The last column of tiles is never full unless it is complete: see `Tiles`.
        if kv_length % bn:
            every[:, :, -1] = False
        return some, every


def _touched(flags: Tensor, of: TileDictionary, q_length: int, kv_length: int, bm: int, bn: int) -> Tensor:
    """Whether a tile of the new size touches a flagged one: differences of sums over rectangles."""
    sums = torch.zeros((flags.shape[0], flags.shape[1] + 1, flags.shape[2] + 1), dtype=torch.int64, device=flags.device)
    sums[:, 1:, 1:] = flags.cumsum(1).cumsum(2)
    edges = []
    for length, size, old, begin in ((q_length, bm, of.block[0], of.start[0]), (kv_length, bn, of.block[1], of.start[1])):
        first = torch.arange(0, length, size, device=flags.device)
        edges.append(((first + begin) // old, ((first + size).clamp(max=length) + begin + old - 1) // old))
    (top, bottom), (left, right) = edges
    top, bottom = top[:, None], bottom[:, None]
    return (sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]) > 0


def compiled(
    function: MaskFunction, batch: int, heads: int, queries: Tensor, keys: Tensor, *, vmap: bool = False,
    block: tuple[int, int] = _BLOCK,
) -> TileDictionary:
    """The dictionary of a mask function, evaluated once on every pair of positions.

    Args:
        function: of batch row, head, query position and key position; see `MaskFunction`.
        batch: B.
        heads: H, 1 if the function does not look at the head.
        queries: int64 [Sq], positions of the queries.
        keys: int64 [Sk], positions of the keys.
        vmap: call it on single positions under `torch.vmap`, for functions that do not broadcast.
        block: (BM, BN), BN a multiple of 8.

    Raises:
        ConfigError: it does not return booleans of a shape that broadcasts to [B, H, Sq, Sk].

    Cost: time O(B * H * Sq * Sk) (O(Sq * Sk) if the function looks at neither batch row nor head); memory: a stripe of 2**18 elements and
        the dictionary.
    """
    rows = torch.arange(batch, device=queries.device)[:, None, None, None]
    head = torch.arange(heads, device=queries.device)[None, :, None, None]

    def evaluate(r0: int, r1: int, c0: int, c1: int) -> Tensor:
        query, key = queries[r0:r1], keys[c0:c1]
        if vmap:
            return _by_element(function, batch, heads, query, key)
        return _checked(function(rows, head, query[None, None, :, None], key[None, None, None, :]), (batch, heads, r1 - r0, c1 - c0))

    return _collected(evaluate, batch * heads, (len(queries), len(keys)), block, queries.device)


def _by_element(function: MaskFunction, batch: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask  # slow import, for few masks

    def at(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return function(b, h, queries[q], keys[k])

    return create_mask(at, batch, heads, len(queries), len(keys), device=str(queries.device))


def _checked(result: object, shape: tuple[int, int, int, int]) -> Tensor:
    """bool [B or 1, H or 1, rows, columns] of what a mask function returned."""
    where, fix = "mask function", "Return a bool tensor that broadcasts to [B, H, Sq, Sk]; for single positions pass vmap=True."
    if not isinstance(result, Tensor) or result.dtype != torch.bool:
        kind = str(result.dtype) if isinstance(result, Tensor) else type(result).__name__
        raise ConfigError(f"The mask function returned {kind}", where=where, fix=fix)
    result = result[(None,) * (4 - result.dim())]
    if result.dim() != 4 or any(got not in (1, wanted) for got, wanted in zip(result.shape, shape, strict=True)):
        raise ConfigError(f"The mask function returned {list(result.shape)} for {list(shape)}", where=where, fix=fix)
    return result.expand(-1, -1, *shape[2:])


def of_dense(mask: Tensor, *, block: tuple[int, int] = _BLOCK) -> TileDictionary:
    """The dictionary of a mask that exists; expanded batch rows and heads count once.

    Args:
        mask: [B or 1, H or 1, Sq, Sk]: bool (True: visible), or floating with nothing but 0 (visible) and -inf or the least number of its
            dtype (hidden).
        block: (BM, BN), BN a multiple of 8.

    Raises:
        ConfigError: not of four dimensions, integers, or other numbers, or none because it is on "meta".

    Cost: reads the mask once; memory as `compiled`.
    """
    if mask.is_meta:
        raise ConfigError("A dense mask on meta has no numbers", where="from_dense", fix="Give the mask itself to attend, or a rule.")
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ConfigError(
            f"A dense mask is {mask.dtype} {list(mask.shape)}", where="from_dense", fix="Give [B, H, Sq, Sk], bool or floating."
        )
    for dim in (0, 1):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    batch, heads, q_length, kv_length = mask.shape
    visible = (lambda part: part) if mask.dtype == torch.bool else _visible
    return _collected(lambda r0, r1, c0, c1: visible(mask[:, :, r0:r1, c0:c1]), batch * heads, (q_length, kv_length), block, mask.device)


def _visible(added: Tensor) -> Tensor:
    """What a mask that is added to scores leaves visible."""
    shown = added == 0
    other = added[~shown & (added > torch.finfo(added.dtype).min) | added.isnan()]
    if len(other):
        raise ConfigError(
            f"A floating mask holds {other[0].item()}", where="from_dense", fix="Masks hold 0 and -inf; pass other numbers as bias=."
        )
    return shown


def _collected(
    evaluate: Callable[[int, int, int, int], Tensor], layers: int, lengths: tuple[int, int], block: tuple[int, int], device: torch.device
) -> TileDictionary:
    (q_length, kv_length), bn = lengths, block[1]
    bm = min(block[0], max(q_length, 1))
    width = max(1, _STRIPE // (max(layers, 1) * bm * bn)) * bn
    known: dict[bytes, int] = {}
    packed: list[Tensor] = [torch.full((1, bm, bn // 8), every, dtype=torch.uint8, device="cpu") for every in (0, 255)]

    def codes_of(*bounds: int) -> Tensor:
        stripe = beneath(evaluate(*bounds))
        with outside_of_transforms():
            return _codes(stripe, (bm, bn), known, packed)

    lines = []
    for r0 in range(0, q_length, bm):
        r1 = min(r0 + bm, q_length)
        parts = [codes_of(r0, r1, c0, min(c0 + width, kv_length)) for c0 in range(0, kv_length, width)]
        lines.append(torch.cat(parts, dim=3) if parts else torch.zeros((1, 1, 1, 0), dtype=torch.int32, device="cpu"))
    none = torch.zeros((1, 1, 0, -(-kv_length // bn)), dtype=torch.int32, device="cpu")
    codes = torch.cat(lines, dim=2) if lines else none
    small = len(known) + 2 <= torch.iinfo(torch.int16).max
    codes, tiles = codes.to(device, torch.int16 if small else torch.int32), torch.cat(packed).to(device)
    return TileDictionary(block=(bm, bn), codes=beneath(codes), tiles=beneath(tiles))


def _codes(stripe: Tensor, block: tuple[int, int], known: dict[bytes, int], packed: list[Tensor]) -> Tensor:
    """int32 [b, h, 1, tiles across] of one stripe [b, h, up to BM, columns]; tiles not known yet are added."""
    (bm, bn), (batch, heads, rows, columns) = block, stripe.shape
    across = -(-columns // bn)
    # Beyond the edges there is nothing: no visible key for "empty", no hidden one for "full".
    shown = torch.zeros((batch, heads, bm, across * bn), dtype=torch.bool, device=stripe.device)
    shown[:, :, :rows, :columns] = stripe
    tiled = shown.view(batch, heads, bm, across, bn).transpose(2, 3)
    counts = tiled.sum((3, 4), dtype=torch.int32)
    sizes = torch.full((across,), bn, dtype=torch.int32, device=stripe.device) * rows
    if columns % bn:
        sizes[-1] = columns % bn * rows
    codes = (counts == sizes).int().cpu()
    partial = ((counts > 0) & (counts != sizes)).cpu()
    for where, tile in zip(partial.nonzero().tolist(), _packed(tiled[partial.to(stripe.device)]), strict=True):
        key = tile.numpy().tobytes()
        if key not in known:
            known[key] = len(known) + 2
            packed.append(tile[None].clone())
        codes[tuple(where)] = known[key]
    return codes[:, :, None]


def _packed(tiles: Tensor) -> Iterator[Tensor]:
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=tiles.device)
    groups = tiles.reshape(*tiles.shape[:2], tiles.shape[2] // 8, 8).to(torch.uint8)
    return iter((groups * weights).sum(-1, dtype=torch.uint8).cpu())
