"""Turns the mask functions of transformers into masks that are rules, and any other function into a dictionary of tiles.

transformers 5.23 describes a mask by closures: `causal_mask_function`, `and_masks(...)` over a window, chunks or packed sequences, and asks
the function registered beside an attention implementation to make a tensor of them. Closures that are known are read, not called: by the
name of the function that made them and by what they hold. Whatever is not known, by a user or by a later version, is evaluated stripe by
stripe; the result is the same, only the way there is longer. Held by tests/integrations/test_masks.py, which fails if a name changes.
Letters: B batch, Sq queries, Sk keys, S both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import causal_mask_function, sdpa_mask

from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.masks.packing import key_conditions
from torchwrap.attention.transforms import recorded, unseen
from torchwrap.core.errors import ConfigError, UnsupportedModelError

__all__ = ["divided_mask", "mask_maker", "packed_mask", "tile_mask", "user_mask", "without_mask"]

_MODULE = "transformers.masking_utils"
Conditions = dict[str, Any]


# One break of the graph: what a closure holds cannot be asked while Dynamo (torch 2.13) traces, nor what a mask holds. Masks that were made
# before, as `generate` does for static caches, enter graphs as they are.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def tile_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> TileMask | None:
    """What transformers' `AttentionMaskInterface` calls: the same mask as its `sdpa_mask` gives, causal ones never skipped, never dense.

    Args:
        batch_size: B.
        q_length: Sq.
        kv_length: Sk.
        q_offset: position of the first query; a 0-dim tensor with static caches.
        kv_offset: position of the first key.
        mask_function: of batch row, head, query position and key position.
        attention_mask: bool or integer [B, positions], which positions hold tokens; what it is too short for holds none.
        use_vmap: the function may not broadcast.
        allow_is_bidirectional_skip: a mask that hides nothing may be None, and serves keys of another length then (Informer shortens them).
        device: of the mask.
        **_: `allow_is_causal_skip`, `local_size`, `dtype` and others that only dense masks need.

    Raises:
        ConfigError: an attention mask that is not of two dimensions, or of another batch.

    Cost: O(B * (Sq + Sk)); for unknown functions the time, not the memory, of B * Sq * Sk.
    """
    where = _Place(batch_size, q_length, kv_length, q_offset, kv_offset)
    offsets: Conditions = {"q_offset": q_offset, "kv_offset": kv_offset, "device": device}
    padding = {} if attention_mask is None else where.padding(attention_mask)
    known = None if use_vmap else _recognised(mask_function, where)
    known = None if known is None else _both(known, padding)
    if known == {} and allow_is_bidirectional_skip:
        return None
    if known is not None:
        return TileMask(batch_size, q_length, kv_length, **known, **offsets)
    return TileMask.from_function(mask_function, batch_size, q_length, kv_length, vmap=use_vmap, **padding, **offsets)


def mask_maker() -> Callable[..., Tensor | None]:
    """`tile_mask`, or what makes booleans of queries times keys where a graph is recorded that others run: a rule is made of numbers that
    nobody can look at there. torch.compile, which can leave its graph for a moment, has rules."""
    leaves = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return tile_mask if leaves or not recorded() else sdpa_mask


def divided_mask(
    mask_function: Callable[..., Any], batch: int, length: int, padding: Conditions, device: torch.device | str
) -> TileMask:  # fmt: skip
    """The mask of whole sequences of which a process has a part, from the function that transformers made for the part.

    Args:
        mask_function: for the part. Packed sequences in it are none: positions of a part jump where another process' tokens are.
        batch: B.
        length: S, of whole sequences.
        padding: conditions of the whole mask.
        device: of the mask.

    Raises:
        UnsupportedModelError: the function is not known, or counts from where a row's tokens begin.
    """
    held = _held(mask_function) if _maker(mask_function) == "and_masks.and_mask" else {}
    remapped = [one for one in held.get("mask_functions", ()) if _maker(one) == "remap_positions_for_packed_sequence.inner_mask"]
    if remapped:
        mask_function = _held(remapped[0])["mask_function"]
    known = _recognised(mask_function, _Place(batch, length, length, 0, 0))
    if known is None or ("chunk" in known and padding):
        raise UnsupportedModelError(
            "the rule of its mask cannot be read" if known is None else "chunks of padded sequences begin elsewhere in every row",
            where="sp_group",
            fix="Unwrap the model, or wrap it without sp_group.",
        )
    return TileMask(batch, length, length, **known, **padding, q_offset=0, device=device)


@dataclass(frozen=True, slots=True)
class _Place:
    """Which part of all positions a mask covers."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int

    def padding(self, valid: Tensor) -> Conditions:
        """Conditions of a mask over all positions, for the key columns of this one."""
        if valid.dim() == 2:
            valid = valid[:, self.kv_offset : self.kv_offset + self.kv_length]
            valid = torch.nn.functional.pad(valid, (0, self.kv_length - valid.shape[1]))
        return dict(key_conditions(valid))


def _recognised(function: Callable[..., Any], where: _Place) -> Conditions | None:
    """The conditions that a mask function of transformers stands for, or None if it is not known."""
    name = getattr(function, "__qualname__", "").replace(".<locals>.", ".")
    if getattr(function, "__module__", None) != _MODULE or name not in _READERS:
        return None
    return _READERS[name](_held(function), where)


def _held(function: Any) -> dict[str, Any]:
    """What a closure holds, by name."""
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}


def _both(one: Conditions, other: Conditions) -> Conditions | None:
    """Conditions that hold if both do; None if no mask has them together."""
    merged = dict(one)
    for name, value in other.items():
        if name in ("right", "left") and name in merged:
            merged[name] = min(merged[name], value)
        elif name in merged:
            return None
        else:
            merged[name] = value
    return merged


def _all_of(held: dict[str, Any], where: _Place) -> Conditions | None:
    functions = held["mask_functions"]
    remapped = [function for function in functions if _maker(function) == "remap_positions_for_packed_sequence.inner_mask"]
    if remapped:
        others = [function for function in functions if function not in remapped]
        return _packed(others, remapped, where)
    found: Conditions | None = {}
    for function in functions:
        one = _recognised(function, where)
        found = None if found is None or one is None else _both(found, one)
    return found


def _maker(function: Any) -> str:
    same = getattr(function, "__module__", None) == _MODULE
    return str(getattr(function, "__qualname__", "")).replace(".<locals>.", ".") if same else ""


def _packed(others: list[Any], remapped: list[Any], where: _Place) -> Conditions | None:
    """A rule on positions within packed sequences: within a sequence positions differ as indices do, so that bands are the same bands."""
    if len(others) != 1 or len(remapped) != 1 or _maker(others[0]) != "packed_sequence_mask_function.inner_mask":
        return None
    found, held = _recognised(others[0], where), _held(remapped[0])
    inner, positions = _recognised(held["mask_function"], where), held["position_ids"]
    if found is None or inner is None or not set(inner) <= {"right", "left", "chunk", "shift"}:
        return None
    if tuple(positions.shape) != (where.batch, where.q_length):
        return None
    numbers = found["q_segments"]
    anew = numbers[:, 1:] != numbers[:, :-1]
    follows = positions[:, 1:] == positions[:, :-1] + 1
    # Sequences that come back, or that skip positions, are no runs.
    if not bool(((numbers[:, 1:] >= numbers[:, :-1]) & (anew | follows)).all()):
        return None
    if "chunk" in inner:
        shift = inner["shift"][:, None]
        of_token = torch.div(positions - shift, inner["chunk"], rounding_mode="floor")
        begins = torch.zeros_like(numbers)
        begins[:, 1:] = anew | (of_token[:, 1:] != of_token[:, :-1])
        numbers = begins.cumsum(1, dtype=torch.int32)
    return {"q_segments": numbers, "k_segments": numbers} | {name: inner[name] for name in ("right", "left") if name in inner}


def _segments(held: dict[str, Any], where: _Place) -> Conditions | None:
    numbers = held["packed_sequence_mask"]
    # It is indexed by position, and transformers makes it for rows without a cache only.
    at_start = isinstance(where.q_offset, int) and where.q_offset == where.kv_offset == 0
    if not at_start or tuple(numbers.shape) != (where.batch, where.q_length) or where.q_length != where.kv_length:
        return None
    return {"q_segments": numbers.int(), "k_segments": numbers.int()}


def _window(held: dict[str, Any], where: _Place) -> Conditions | None:
    return {"left": held["sliding_window"] - 1} if _counts(held["sliding_window"]) else None


def _window_both_sides(held: dict[str, Any], where: _Place) -> Conditions | None:
    width = held["sliding_window"]
    return {"left": width, "right": width} if _counts(width) or width == 0 else None


def _chunks(held: dict[str, Any], where: _Place) -> Conditions | None:
    if not _counts(held["chunk_size"]) or tuple(held["left_padding"].shape) != (where.batch,):
        return None
    return {"chunk": held["chunk_size"], "shift": held["left_padding"].int()}


def _counts(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


_READERS: dict[str, Callable[[dict[str, Any], _Place], Conditions | None]] = {
    "causal_mask_function": lambda held, where: {"right": 0},
    "bidirectional_mask_function": lambda held, where: {},
    "and_masks.and_mask": _all_of,
    "sliding_window_overlay.inner_mask": _window,
    "sliding_window_bidirectional_overlay.inner_mask": _window_both_sides,
    "chunked_overlay.inner_mask": _chunks,
    "packed_sequence_mask_function.inner_mask": _segments,
    "padding_mask_function.inner_mask": lambda held, where: where.padding(held["padding_mask"]),
}

_seen = WeakTensorKeyDictionary()


def user_mask(mask: Tensor, queries: int) -> TileMask | Tensor:
    """A mask of four dimensions that the user gave, once for all layers: as tiles, or as it is if it holds other numbers than 0 and -inf.

    Args:
        mask: [B or 1, H or 1, Sq or 1, Sk], bool or floating.
        queries: Sq.

    Cost: reads a mask without gradient once, as long as it is the same tensor and nobody writes to it; in every layer for tensors of
        inference mode, which do not tell.
    """
    if mask.dim() != 4 or isinstance(mask, TileMask):
        return mask
    rows = mask.expand(-1, -1, queries, -1) if mask.shape[2] == 1 else mask
    # A bias that is learned begins at zero in many models (Swin, BEiT): as tiles it would show everything, and learn nothing.
    if recorded() or mask.requires_grad:
        return rows
    if mask.is_inference():
        made = _as_tiles(mask, queries)
        return rows if made is None else made
    version, count, made = _seen.get(mask, (None, None, None))
    if (version, count) != (mask._version, queries):
        with unseen():
            made = _as_tiles(mask, queries)
        _seen[mask] = (mask._version, queries, made)
    return rows if made is None else made


# Reads lengths from the device, as a graph cannot.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_mask(
    mask: Tensor | None, q_lengths: Tensor, k_lengths: Tensor | None, shape: tuple[int, int, int], causal: bool, window: int | None
) -> Tensor:
    """The mask of a row of sequences whose cumulative lengths the call was given, as collators without padding give them.

    Args:
        mask: what transformers or the user made. Packed sequences that it knows stay, and so does a dense one; of another the band.
        q_lengths: integers [N + 1], of the queries.
        k_lengths: of the keys; None: the same.
        shape: B, Sq and Sk of the call.
        causal: without a mask, whether a query sees no later key.
        window: without a mask, how many keys a query sees.

    Raises:
        ConfigError: a batch, or lengths that are not of these tokens.
        UnsupportedModelError: a mask of other conditions than a band, which count from where a sequence begins.

    Cost: O(Sq + Sk), and a read from the device, in every layer.
    """
    if mask is not None and (not isinstance(mask, TileMask) or mask.q_segments is not None):
        return mask
    batch, queries, keys = shape
    ends = (int(q_lengths[-1]), int((q_lengths if k_lengths is None else k_lengths)[-1]))
    if batch != 1 or ends != (queries, keys):
        raise ConfigError(
            f"cu_seq_lens end at {ends[0]} queries and {ends[1]} keys, and the call has {batch} rows of {queries} and {keys}",
            where="cu_seq_lens_q",
            fix="Give lengths of all tokens of one row, and no cache that holds others.",
        )
    right, left = (0 if causal else None), (None if window is None else window - 1)
    if mask is not None:
        right, left = mask.right, mask.left
        if mask.chunk is not None or mask.dictionary is not None or right not in (None, 0):
            raise UnsupportedModelError(
                "its mask has other conditions than a causal band",
                where="cu_seq_lens_q",
                fix="Give position_ids alone, and use_cache=False.",
            )
    return TileMask.from_cu_seqlens(
        q_lengths, k_lengths, q_length=queries, kv_length=keys, causal=right == 0, window=None if left is None else left + 1
    )


def _as_tiles(mask: Tensor, queries: int) -> TileMask | None:
    try:
        made = TileMask.from_dense(mask)
    except ConfigError:
        return None  # numbers that are added to scores
    batch, heads, rows, columns = made.shape
    if rows != 1 or queries == 1:
        return made
    visible = made.rectangles((0, 1), (0, columns))
    if heads == 1:  # padding, whose columns are the same for every query
        padding: Conditions = dict(key_conditions(visible[:, 0, 0]))
        return TileMask(batch, queries, columns, device=mask.device, **padding)
    return TileMask.from_dense(visible.expand(-1, -1, queries, -1))


def without_mask(query: Tensor, key: Tensor, value: Tensor, causal: bool, window: int | None) -> tuple[TileMask | None, Tensor, Tensor]:
    """What `None` means to transformers' sdpa function: everything, or causal from the first key on."""
    length = query.shape[2]
    if not causal or length == 1:
        return None, key, value
    key, value = key[:, :, :length], value[:, :, :length]  # an empty static cache: what lies behind was never written
    if window is None:
        return TileMask.causal(1, length, key.shape[2], device=query.device), key, value
    return TileMask.window(1, length, key.shape[2], window, device=query.device), key, value
