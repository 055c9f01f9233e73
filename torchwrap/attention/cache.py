"""Keys and values of one layer in memory that grows in steps, so that a token costs its own bytes and not a copy of all before it.

The idea is the growing array (amortised doubling): new tokens are written behind the old ones, and what is handed out are views. Tensors
that came from elsewhere (a prompt's keys) are kept as they are until the first token has to follow them. With a `window` only the last
tokens stay: they wander through the memory and are moved back to its beginning when they reach its end.

Letters: B batch, Hkv key heads, S tokens held, D and Dv widths of keys and of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchwrap.core.config import format_bytes

__all__ = ["Arena", "ArenaPlan"]

_LEAST = 64
"""Tokens of room that are worth an allocation (chosen)."""

_DOUBLES_UNTIL = 1 << 16
"""Tokens above which memory grows by a quarter instead (chosen: a long context must not ask for twice its bytes)."""


class Arena:
    """Keys and values of one layer, appended to in place.

    What is handed out are views: they stay as they are while tokens are appended, and change when tokens are taken back (`crop`),
    rows are exchanged (`reorder`) or a window moves on. Inference only: a graph that keeps such views for a backward would see them change.

    Args:
        window: tokens to keep; None: all.

    Attributes:
        keys: `[B, Hkv, S, D]`, a view; None before the first token.
        values: `[B, Hkv, S, Dv]`, a view; None before the first token.
        copied_bytes: bytes of old tokens that were moved so far.
        growths: allocations so far.

    Cost: at most twice the bytes of the tokens (1.25 times above 65,536 tokens; one and a half windows with a window), and while it grows
        the old memory as well. A token is moved less than twice on average.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.copied_bytes: int = 0
        self.growths: int = 0
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.keys, self.values = None, None
        self._stores: tuple[Tensor, Tensor] | None = None  # None also while the tensors held came from elsewhere
        self._first = 0

    @property
    def length(self) -> int:
        """S."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that fit into the memory there is; 0 while the tensors held came from elsewhere."""
        return 0 if self._stores is None else self._stores[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory there is."""
        return sum(store.numel() * store.element_size() for store in self._stores or ())

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Hold these tensors instead, as they are; with a window, the last tokens of them."""
        first = 0 if self.window is None else max(0, keys.shape[2] - self.window)
        self._stores, self._first = None, 0
        self.keys, self.values = keys[:, :, first:], values[:, :, first:]
        if _is_small_part(keys) or _is_small_part(values):  # it would keep a much larger tensor alive
            self._settle(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens behind those held.

        Args:
            keys: `[B, Hkv, n, D]`.
            values: `[B, Hkv, n, Dv]`.

        Returns:
            Keys and values of the tokens held before and of the new ones, views. With a window they are more than what is held
            afterwards: the first of the new tokens still sees all that were held.
        """
        if self.keys is None:
            self.hold(keys, values)
            return keys, values
        new = keys.shape[2]
        end = self._first + self.length
        if not self._takes(keys, end + new):
            self._settle(new)
            end = self.length
        assert self._stores is not None
        for store, given in zip(self._stores, (keys, values), strict=True):
            store[:, :, end : end + new] = given
        whole = self._view(self._first, end + new)
        if self.window is not None:
            self._first = max(self._first, end + new - self.window)
        self.keys, self.values = self._view(self._first, end + new)
        return whole

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; their places are written again."""
        if self.keys is not None and self.values is not None and tokens:
            left = max(0, self.length - tokens)
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def reorder(self, rows: Tensor) -> None:
        """Let batch row b hold what row `rows[b]` held.

        Args:
            rows: int64 `[B]`.

        Cost: twice the bytes of the rows that change, nothing if none does (known on the CPU only; elsewhere all rows are copied).
        """
        if self.keys is None or self.values is None:
            return
        if self._stores is None or len(rows) != self.keys.shape[0] or not self._writable(self._stores[0]):
            self.hold(self.keys.index_select(0, rows), self.values.index_select(0, rows))
            return
        if rows.device.type == "cpu":
            changed = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
            if not len(changed):
                return
        else:
            changed = torch.arange(len(rows), device=rows.device)
        for view in (self.keys, self.values):
            view.index_copy_(0, changed, view.index_select(0, rows[changed]))
            self.copied_bytes += len(changed) * view[0].numel() * view.element_size()

    def _takes(self, like: Tensor, end: int) -> bool:
        """Can tokens like these be written up to `end`?"""
        if self._stores is None:
            return False
        store = self._stores[0]
        same = (store.shape[0], store.dtype, store.device) == (like.shape[0], like.dtype, like.device)
        return same and end <= store.shape[2] and self._writable(store)

    @staticmethod
    def _writable(store: Tensor) -> bool:
        """Memory made under inference mode cannot be written outside it."""
        return torch.is_inference_mode_enabled() or not store.is_inference()

    def _settle(self, new: int) -> None:
        """Move what is held to the beginning of memory with room for `new` tokens more."""
        assert self.keys is not None and self.values is not None
        length = self.length
        reuse = self.window is not None and self._takes(self.keys, length + new)
        stores = []
        for index, view in enumerate((self.keys, self.values)):
            if reuse and self._stores is not None:
                store, view = self._stores[index], view.clone()  # the two places may overlap
            else:
                store = _made(view, self._room(length, length + new), length + new)
                self.growths += 1 - index
            store[:, :, :length] = view
            self.copied_bytes += view.numel() * view.element_size()
            stores.append(store)
        self._stores, self._first = (stores[0], stores[1]), 0
        self.keys, self.values = self._view(0, length)

    def _room(self, length: int, needed: int) -> int:
        if self.window is not None:
            return max(needed, self.window + max(self.window // 2, _LEAST))
        grown = 2 * length if length < _DOUBLES_UNTIL else length + length // 4
        return max(grown, needed + _LEAST)

    def _view(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        assert self._stores is not None
        keys, values = self._stores
        return keys[:, :, first:end], values[:, :, first:end]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaPlan:
    """What the keys and values of a sequence take on one device.

    Attributes:
        tokens: of the sequence, prompt and answer together.
        windows: for each layer, the tokens it keeps; None: all.
        token_bytes: for each layer, of one token of every row of the batch.
    """

    tokens: int
    windows: tuple[int | None, ...]
    token_bytes: tuple[int, ...]

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens at the end."""
        return sum(min(self.tokens, window or self.tokens) * each for window, each in zip(self.windows, self.token_bytes, strict=True))

    @property
    def device_bytes(self) -> int:
        """Most bytes at any time: every layer's memory as large as it may get, and beside it the old memory of the one that grows."""
        rooms = [(self._room(window), each) for window, each in zip(self.windows, self.token_bytes, strict=True)]
        return sum(room * each for room, each in rooms) + max(min(self.tokens, room) * each for room, each in rooms)

    @property
    def host_bytes(self) -> int:
        """None: everything is on the device."""
        return 0

    def explain(self) -> str:
        """The plan in words, with its numbers."""
        return (
            f"{self.tokens} tokens in {len(self.windows)} layers: {format_bytes(self.held_bytes)} of keys and values on the device, in "
            f"memory of at most {format_bytes(self.device_bytes)} while it grows; nothing on the host"
        )

    def _room(self, window: int | None) -> int:
        if window is not None and window <= self.tokens:
            return window + max(window // 2, _LEAST)
        grown = 2 * self.tokens if self.tokens < _DOUBLES_UNTIL else self.tokens + self.tokens // 4
        return max(grown, self.tokens + _LEAST)


def _made(like: Tensor, wanted: int, needed: int) -> Tensor:
    """Memory for so many tokens; where there is none for what is wanted, for what is needed, as concatenation would take."""
    try:
        return like.new_empty(*like.shape[:2], wanted, like.shape[3])
    except RuntimeError:  # CUDA has a class of its own for "no memory", the CPU none
        return like.new_empty(*like.shape[:2], needed, like.shape[3])


def _is_small_part(tensor: Tensor) -> bool:
    """Is this a view of a tensor that is a quarter larger or more?"""
    return tensor.untyped_storage().nbytes() > 1.25 * tensor.numel() * tensor.element_size()
