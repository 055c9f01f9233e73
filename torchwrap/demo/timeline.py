"""The memory timeline of a wrapped run as a picture.

Above: bytes of weights present over the whole story, against the line of the full model and the line of the budget. Below: a window of a
few tokens, enlarged, with the same curve and two lanes, what the disk reads and what the processor computes, so that one sees the next
block arrive while the present one is used. Drawn from the records that `offload(record=True)` keeps; nothing is interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchwrap.stream.picture import FAINT, INK, canvas, draw_lanes, plain, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchwrap.stream.timeline import Event

__all__ = ["Story", "draw"]

_CURVE, _BUDGET = "#3b7dd8", "#d8503b"


@dataclass(kw_only=True)
class Story:
    """What the picture shows.

    Args:
        samples: (seconds, bytes of weights present), each value valid until the next.
        bars: what was read, computed and waited for.
        full_bytes: bytes of all weights.
        budget_bytes: the budget that was set.
        marks: (seconds, label) of moments worth a line, in order.
        tokens: seconds at which a token came out.
        wrapped: first and last second of the part that the budget applies to; `None` means all of it.
    """

    samples: list[tuple[float, int]]
    bars: list[Event]
    full_bytes: int
    budget_bytes: int
    marks: list[tuple[float, str]] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    wrapped: tuple[float, float] | None = None

    @property
    def peak_bytes(self) -> int:
        """Most bytes of weights present at any recorded moment of the wrapped part."""
        low, high = self.wrapped or (float("-inf"), float("inf"))
        return max((nbytes for at, nbytes in self.samples if low <= at <= high), default=0)


def draw(story: Story, *, title: str, tokens_shown: int = 3) -> bytes:
    """Draw the story.

    Args:
        story: what happened.
        title: first line of the picture.
        tokens_shown: tokens in the enlarged window.

    Returns:
        A PNG file as bytes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install 'torchwrap[demo]'`).
    """
    figure = canvas(12, 7.6, 130)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.0, 1.15), left=0.08, right=0.97, top=0.85, bottom=0.085, hspace=0.3)
    lower = grid[1].subgridspec(2, 1, height_ratios=(1.5, 1.0), hspace=0.08)
    origin = story.samples[0][0] if story.samples else 0.0
    window = _window(story, tokens_shown)
    whole, near, lanes = figure.add_subplot(grid[0]), figure.add_subplot(lower[0]), figure.add_subplot(lower[1])
    _memory(whole, story, origin, top=story.full_bytes)
    whole.legend(loc="upper left", bbox_to_anchor=(0.0, 1.17), ncols=3, frameon=False, fontsize=9.5, borderaxespad=0)
    _moments(whole, story, origin)
    # The full model's line would press the part of interest flat: below, the budget is the ceiling.
    _memory(near, story, origin, top=max(story.budget_bytes, story.peak_bytes))
    for axes in (near, lanes):
        axes.set_xlim(window[0] - origin, window[1] - origin)
    if window[1] > window[0]:
        whole.axvspan(window[0] - origin, window[1] - origin, ymax=0.89, color="#f2c14e", alpha=0.45, lw=0, zorder=0)
    _lanes(lanes, story, origin, window)
    whole.set_xlabel("seconds")
    lanes.set_xlabel("seconds (the shaded part above)")
    near.tick_params(labelbottom=False)
    near.set_title(f"{tokens_shown} tokens, enlarged", loc="left", fontsize=10, color=INK)
    figure.text(0.08, 0.945, title, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.08, 0.908, _subtitle(story), fontsize=10.5, color=FAINT)
    return png(figure)


def _subtitle(story: Story) -> str:
    share = story.peak_bytes / story.full_bytes if story.full_bytes else 0.0
    reads = [bar for bar in story.bars if bar.lane == "read"]
    moved = sum(bar.nbytes for bar in reads)
    return (
        f"weights present at the peak: {_megabytes(story.peak_bytes)} of {_megabytes(story.full_bytes)} ({share:.0%}), "
        f"budget {_megabytes(story.budget_bytes)}; {_megabytes(moved)} read from disk in {len(reads)} reads"
    )


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _memory(axes: Axes, story: Story, origin: float, *, top: int) -> None:
    times = [at - origin for at, _ in story.samples]
    present = [nbytes / 2**20 for _, nbytes in story.samples]
    axes.fill_between(times, present, step="post", color=_CURVE, alpha=0.22, lw=0)
    axes.plot(times, present, drawstyle="steps-post", color=_CURVE, lw=1.3, label="weights present")
    for nbytes, color, name in ((story.full_bytes, FAINT, "full model"), (story.budget_bytes, _BUDGET, "budget")):
        axes.axhline(nbytes / 2**20, color=color, lw=1.4, ls=(0, (5, 3)), label=f"{name}, {_megabytes(nbytes)}")
    axes.set_ylim(0, top / 2**20 * 1.12)
    if times:
        axes.set_xlim(times[0], times[-1])
    axes.set_ylabel("weights, MiB")
    plain(axes)


def _moments(axes: Axes, story: Story, origin: float) -> None:
    """Name the parts of the story between one mark and the next."""
    top = story.full_bytes / 2**20
    ends = [at for at, _ in story.marks[1:]] + ([story.samples[-1][0]] if story.samples else [])
    for (at, label), end in zip(story.marks, ends, strict=False):
        axes.axvline(at - origin, color=INK, lw=0.8, alpha=0.5)
        axes.text((at + end) / 2 - origin, top * 1.055, label, ha="center", va="center", fontsize=9, color=INK)


def _window(story: Story, tokens_shown: int) -> tuple[float, float]:
    """A stretch of whole tokens from the middle of the run, where nothing is special."""
    if len(story.tokens) > tokens_shown:
        first = (len(story.tokens) - tokens_shown) // 2
        return story.tokens[first], story.tokens[first + tokens_shown]
    if story.samples:
        return story.samples[0][0], story.samples[-1][0]
    return 0.0, 1.0


def _lanes(axes: Axes, story: Story, origin: float, window: tuple[float, float]) -> None:
    draw_lanes(axes, [bar for bar in story.bars if bar.end >= window[0] and bar.start <= window[1]], origin)
    for at in story.tokens:
        if window[0] <= at <= window[1]:
            axes.axvline(at - origin, color=INK, lw=0.8, alpha=0.5)
