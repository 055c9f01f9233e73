"""The law of the two knobs, and the choice of them. Pure functions of times; nothing here touches a model.

Notation: n blocks are used one after another, again and again; t_c seconds compute one, t_x seconds bring one in, and each request of a
batch costs the link o seconds more. At most k blocks are present. When the last of k' consecutive blocks has been used, the places of
those that are not among the next k are given up together, and what is missing of the next k is requested together: m = min(k', n - k)
blocks. (For k' > n - k some blocks of the batch come up again so soon that they stay: a pass then moves n (n - k) / k' blocks, not n.)

Between the end of a batch and the first of the blocks requested then, k - k' blocks that are present can be computed. If bringing in a
whole batch takes no longer, k' * t_x <= (k - k') * t_c, nobody waits for a batch ("the law"); the link keeps up if also t_x <= t_c. Where
it does not hold, the time of a batch follows from the slowest cycle of dependences (a max-plus cycle mean): with blocks usable only when
their whole batch is there (`batch_seconds_together`) it is

    max(k' t_c,  o + m t_x,  k' t_c + (o + m t_x) - (k - k') t_c),

and with each block usable as soon as it is there, as in our engine (`batch_seconds`), the last term becomes the largest over the j-th
block of a batch, which is needed k - k' + j uses after its request and arrives o + j t_x after it. The first is never below the second,
so the law is safe for both. Source: "Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models", 2024, names k and
k' and gives no rule; the rule and the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from torchwrap.core import errors
from torchwrap.stream.passes import Passes, Times, Used

__all__ = [
    "Choice",
    "Knobs",
    "Profile",
    "batch_seconds",
    "batch_seconds_together",
    "choose",
    "fastest_batch",
    "obeys_law",
    "stall_free",
]


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured times of one pass over n blocks, in seconds: of a forward, or of a forward and its backward.

    Attributes:
        compute_s: of each block's forward, in order of use.
        transfer_s: to bring in each block, alone.
        rest_s: of everything outside the blocks.
        overhead_s: of each request of a batch, besides the blocks' own transfer.
        backward_s: of each block's backward, 0 for a block that it does not reach; () for a forward alone.
        rest_backward_s: of everything in the backward outside the blocks.
        update_s: in which an optimizer that rewrites the blocks keeps their link busy, for each block; () if there is none.
    """

    compute_s: tuple[float, ...]
    transfer_s: tuple[float, ...]
    rest_s: float = 0.0
    overhead_s: float = 0.0
    backward_s: tuple[float, ...] = ()
    rest_backward_s: float = 0.0
    update_s: tuple[float, ...] = ()

    @classmethod
    def of(cls, times: Times, nbytes: Mapping[int, int]) -> Profile:
        """The profile of a pass measured apart; blocks by their index, `nbytes` of all there are. One used twice counts as one."""
        forward, backward = (_sums(uses) for uses in (times.forward, times.backward))
        units = [unit for unit in nbytes if unit in forward]
        rate = median(seconds / nbytes[unit] for unit, seconds in times.transfer_s.items())
        return cls(
            compute_s=tuple(forward[unit] for unit in units),
            transfer_s=tuple(times.transfer_s.get(unit, rate * nbytes[unit]) for unit in units),
            rest_s=times.rest_s,
            backward_s=tuple(backward.get(unit, 0.0) for unit in units) if backward else (),
            rest_backward_s=times.rest_backward_s,
        )

    @property
    def units(self) -> int:
        """Number of blocks."""
        return len(self.compute_s)

    @property
    def trains(self) -> bool:
        """Whether this is a training pass: a forward and its backward."""
        return bool(self.backward_s)

    @property
    def resident_s(self) -> float:
        """Seconds of a pass with all blocks present."""
        computing = sum(self.compute_s) + self.rest_s + sum(self.backward_s) + self.rest_backward_s
        return max(computing, sum(self.update_s))

    def pass_seconds(self, k: int, k_prime: int) -> float:
        """Seconds of a steady pass under these knobs, by simulation."""
        if k >= self.units:
            return self.resident_s
        back = [unit for unit in reversed(range(self.units)) if self.trains and self.backward_s[unit]]
        times = Times(
            forward=tuple(Used(unit, seconds) for unit, seconds in enumerate(self.compute_s)),
            rest_s=self.rest_s,
            backward=tuple(Used(unit, self.backward_s[unit]) for unit in back),
            rest_backward_s=self.rest_backward_s,
        )
        return Passes(
            times=times,
            slots=k,
            batch=k_prime,
            transfer_s=dict(enumerate(self.transfer_s)),
            overhead_s=self.overhead_s,
            read_s=dict(enumerate(self.update_s)),
            renewed=bool(self.update_s),
        ).seconds

    def slowdown(self, k: int, k_prime: int) -> float:
        """`pass_seconds` as a multiple of the time with all blocks present."""
        return self.pass_seconds(k, k_prime) / self.resident_s if self.resident_s else 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Knobs and what they cost: `slowdown` is the predicted time of a pass over that with all blocks present."""

    k: int
    k_prime: int
    slowdown: float


@dataclass(frozen=True, slots=True)
class Knobs:
    """k and k' over n blocks.

    Raises:
        ConfigError: not 1 <= k' <= k <= n.
    """

    k: int
    k_prime: int
    units: int

    def __post_init__(self) -> None:
        for name in ("k", "k_prime"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise errors.ConfigError(f"superpipeline: {name}={value!r}", where=name, fix="Give a number of blocks.")
        if not 1 <= self.k <= self.units:
            raise errors.ConfigError(
                f"superpipeline: k={self.k}, but the model has {self.units} block(s)", where="k", fix=f"Use k from 1 to {self.units}."
            )
        if not 1 <= self.k_prime <= self.k:
            raise errors.ConfigError(
                f"superpipeline: k_prime={self.k_prime}, but at most k={self.k} blocks are present",
                where="k_prime",
                fix=f"Use k_prime from 1 to {self.k}.",
            )

    @property
    def moved_per_batch(self) -> int:
        """Blocks brought in for each batch of k' uses."""
        return min(self.k_prime, self.units - self.k)

    @property
    def moved_per_pass(self) -> float:
        """Blocks brought in per pass in the long run."""
        return self.units * self.moved_per_batch / self.k_prime

    @property
    def moved_per_step(self) -> int:
        """Blocks brought in per training step: forward and backward each reuse the k blocks present when the other turned."""
        return 2 * (self.units - self.k)

    @property
    def moved_per_update(self) -> int:
        """The same for a step after which an optimizer rewrote every block: those present at its end are then out of date."""
        return 2 * self.units - self.k if self.k < self.units else 0

    @property
    def saved(self) -> float:
        """Fraction of the blocks' memory that is saved, for blocks of one size."""
        return 1 - self.k / self.units


def obeys_law(knobs: Knobs, compute_s: float, transfer_s: float, overhead_s: float = 0.0) -> bool:
    """Whether bringing in a batch takes no longer than computing the blocks that are present meanwhile."""
    return overhead_s + knobs.moved_per_batch * transfer_s <= (knobs.k - knobs.k_prime) * compute_s


def stall_free(knobs: Knobs, compute_s: float, transfer_s: float, overhead_s: float = 0.0) -> bool:
    """Whether the law promises that computing never waits in the long run: it holds, and the link is not the slower side."""
    link = overhead_s + knobs.moved_per_batch * transfer_s
    return obeys_law(knobs, compute_s, transfer_s, overhead_s) and link <= knobs.k_prime * compute_s


def batch_seconds_together(knobs: Knobs, compute_s: float, transfer_s: float, overhead_s: float = 0.0) -> float:
    """Seconds from one batch to the next in the long run, if blocks can be used only when their whole batch is present."""
    if not knobs.moved_per_batch:
        return knobs.k_prime * compute_s
    computing = knobs.k_prime * compute_s
    link = overhead_s + knobs.moved_per_batch * transfer_s
    return max(computing, link, computing + link - (knobs.k - knobs.k_prime) * compute_s)


def batch_seconds(knobs: Knobs, compute_s: float, transfer_s: float, overhead_s: float = 0.0) -> float:
    """Seconds from one batch to the next in the long run, with each block usable as soon as it is present: what our engine does.

    The j-th block of a batch is used k - k' + j uses after its request. The batch in which it is used ends `left` uses later, and that
    end is `batches` ends after the one at which the block was requested, so that a turn of this cycle takes
    (o + j t_x + (1 + left) t_c) / batches per batch.
    """
    if not knobs.moved_per_batch:
        return knobs.k_prime * compute_s
    longest = max(knobs.k_prime * compute_s, overhead_s + knobs.moved_per_batch * transfer_s)
    for j in range(1, knobs.moved_per_batch + 1):
        ahead = knobs.k - knobs.k_prime + j
        batches = -(-ahead // knobs.k_prime)
        left = batches * knobs.k_prime - ahead
        longest = max(longest, (overhead_s + j * transfer_s + (1 + left) * compute_s) / batches)
    return longest


def fastest_batch(k: int, units: int, compute_s: float, transfer_s: float, overhead_s: float = 0.0) -> int:
    """The k' from 1 to k with the least time per block; of equals the smallest."""

    def cost(batch: int) -> tuple[float, int]:
        return round(batch_seconds(Knobs(k, batch, units), compute_s, transfer_s, overhead_s) / batch, 12), batch

    return min(range(1, k + 1), key=cost)


def choose(
    profile: Profile, *, max_slowdown: float, allowed: Sequence[int] | None = None, k: int | None = None, k_prime: int | None = None
) -> Choice:
    """The knobs for a model.

    Args:
        profile: measured times.
        max_slowdown: allowed time of a pass over that with all blocks present.
        allowed: values of k that memory allows, smallest first; None: all.
        k: given by the user; None chooses the smallest that keeps `max_slowdown`.
        k_prime: given by the user; None chooses the fastest for that k.

    Returns:
        The choice. If no allowed k keeps `max_slowdown`, the smallest of the fastest.

    Cost: about log2(n) simulations of a few passes, twice as many in training.
    """
    n = profile.units
    mean_c, mean_x = fmean(profile.compute_s), fmean(profile.transfer_s)

    def at(blocks: int) -> Choice:
        batches = [k_prime or fastest_batch(blocks, n, mean_c, mean_x, profile.overhead_s)]
        if k_prime is None and profile.trains:
            batches = sorted({1, *batches})  # the law is about a scan in one direction
        return min((Choice(blocks, batch, profile.slowdown(blocks, batch)) for batch in batches), key=lambda choice: choice.slowdown)

    if k is not None:
        return at(k)
    candidates = [blocks for blocks in allowed or range(1, n + 1) if (k_prime or 1) <= blocks <= n] or [max(k_prime or 1, 1)]
    limit = max(max_slowdown, at(candidates[-1]).slowdown * 1.01)  # what cannot be had with all the memory is not sought
    return at(_first(candidates, lambda blocks: at(blocks).slowdown <= limit))


def _sums(uses: Sequence[Used]) -> dict[int, float]:
    found: dict[int, float] = {}
    for use in uses:
        found[use.unit] = found.get(use.unit, 0.0) + use.seconds
    return found


def _first(numbers: Sequence[int], holds: Callable[[int], bool]) -> int:
    """The smallest number for which `holds`, which is true of the last and, once true, stays so: more blocks never make a pass slower."""
    low, high = 0, len(numbers) - 1
    while low < high:
        middle = (low + high) // 2
        if holds(numbers[middle]):
            high = middle
        else:
            low = middle + 1
    return numbers[low]
