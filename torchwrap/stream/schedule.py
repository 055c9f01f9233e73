"""In which order units are used, learned by watching.

Layer streaming is a cyclic scan: block 0, 1, ... n-1, head, and again for the next token. Some models scan differently: ALBERT uses one
block n times, an encoder-decoder runs its encoder once and then cycles through the decoder, a wrapped vision tower comes and goes. All of
them are predicted well by remembering what followed the last *two* uses, so that is what is kept: a table from (unit before, unit now)
to the next unit, overwritten whenever something else follows. Nothing has to be invalidated when the order changes: one miss, and the
table holds the new order. Source of the idea: the trace-based prefetcher of Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory
Wall for Extreme Scale Deep Learning", 2021, section 6; the context table is ours.
"""

from __future__ import annotations

__all__ = ["Schedule"]


class Schedule:
    """Successor table of unit uses, with two units of context and one as fall-back."""

    def __init__(self) -> None:
        self._after_two: dict[tuple[int, int], int] = {}
        self._after_one: dict[int, int] = {}
        self._before = self._now = -1
        self.misses: int = 0

    def advance(self, unit: int) -> None:
        """Note that `unit` is being used now."""
        if self._now >= 0:
            expected = self._next(self._before, self._now)
            if expected != unit:
                self.misses += expected is not None
                self._after_one[self._now] = unit
                self._after_two[(self._before, self._now)] = unit
            else:
                self._after_two.setdefault((self._before, self._now), unit)
        self._before, self._now = self._now, unit

    def predict(self, count: int) -> list[int]:
        """The next `count` *different* units expected after the present one, nearest first; shorter when less is known."""
        chain: list[int] = []
        before, now = self._before, self._now
        # A unit may be used many times in a row (shared blocks), so more steps than units are followed, but not for ever.
        for _ in range(count + len(self._after_two) + 1):
            following = self._next(before, now)
            if following is None or len(chain) >= count:
                break
            if following not in chain:
                chain.append(following)
            before, now = now, following
        return chain

    def seed(self, order: list[int]) -> None:
        """Assume a first order (that of the model's definition), so that the very first pass is prefetched too.

        A backward runs through it in reverse: whoever came from the next one goes on to the one before.
        """
        for now, following in zip(order, order[1:] + order[:1], strict=True):
            self._after_one.setdefault(now, following)
        for before, now, following in zip(order[2:], order[1:], order, strict=False):
            self._after_two.setdefault((before, now), following)

    def _next(self, before: int, now: int) -> int | None:
        following = self._after_two.get((before, now))
        return self._after_one.get(now) if following is None else following
