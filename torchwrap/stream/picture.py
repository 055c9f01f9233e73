"""What a timeline recorded as a picture: bytes of weights present above, a lane for each thing that happens at once below.

Lanes that move bytes come first, then computing, then the optimizer, then what the computing thread waited for. Nothing is interpolated:
each bar is an event, and a lane that has none is left out. `canvas` and `png` serve the other pictures of the library, too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchwrap.core.config import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchwrap.stream.timeline import Event, Lane, Timeline

__all__ = ["FAINT", "INK", "canvas", "draw", "draw_lanes", "plain", "png"]

INK: str = "#20262e"
FAINT: str = "#6b7280"

# A row of the picture, and (lane, what it is called, color) of its bars; what comes later is drawn over what comes before.
_ROWS: tuple[tuple[str, tuple[tuple[Lane, str, str], ...]], ...] = (
    ("weights in", (("read", "weights read", "#3b7dd8"),)),
    ("activations", (("save", "activations out", "#9d7bd8"), ("load", "activations back", "#5b3fa0"))),
    ("state in", (("state", "optimizer reads", "#4fb3d9"),)),
    ("state out", (("write", "optimizer writes", "#8a5a2b"),)),
    ("compute", (("backward", "backward", "#14532d"), ("compute", "forward (again in backward)", "#4cbf7f"))),
    ("update", (("update", "optimizer updates", "#f2a33a"),)),
    ("waiting", (("stall", "computing waits", "#d8503b"),)),
)


def canvas(width: float, height: float, dpi: int) -> Figure:
    """An empty white figure of this many inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install 'torchwrap[demo]'`).
    """
    try:
        # The object interface instead of pyplot: no window system, no global state, no backend of the user's changed.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install 'torchwrap[demo]'", name="matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", pil_kwargs={"optimize": True})
    return picture.getvalue()


def plain(axes: Axes) -> None:
    """No frame above and to the right, and small figures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.margins(x=0)


def draw(timeline: Timeline, since: float, until: float, title: str) -> bytes:
    """See `Timeline.picture`; `since` and `until` are seconds on the timeline's clock."""
    figure = canvas(12, 6.2, 120)
    memory, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(0.55, 1.0))
    figure.subplots_adjust(left=0.085, right=0.98, top=0.82, bottom=0.15, hspace=0.1)
    # One that came before is present still when the window begins.
    samples = sorted(sample for sample in list(timeline.samples) if sample[0] <= until)
    times = [at - since for at, _ in samples] + [until - since]
    present = [nbytes / 2**20 for _, nbytes in samples]
    present = [*present, present[-1] if present else timeline.base_bytes / 2**20]
    memory.fill_between(times, present, step="post", color="#3b7dd8", alpha=0.22, lw=0)
    memory.plot(times, present, drawstyle="steps-post", color="#3b7dd8", lw=1.3)
    memory.set_ylim(bottom=0)
    memory.set_ylabel("weights, MiB")
    memory.tick_params(labelbottom=False)
    plain(memory)
    events = [event for event in list(timeline.events) if event.end > since and event.start < until]
    draw_lanes(lanes, events, since)
    lanes.set_xlabel("seconds")
    lanes.set_xlim(0, until - since)
    marks = [(at - since, label) for at, label in list(timeline.marks) if since <= at <= until]
    for at, label in marks:
        for axes in (memory, lanes):
            axes.axvline(at, color=INK, lw=0.8, alpha=0.6)
        end = at > 0.9 * (until - since)  # a name to the right of its line would leave the picture
        where, side = ((-4, 3), "right") if end else ((4, 3), "left")
        memory.annotate(label, (at, 1), where, ("data", "axes fraction"), "offset points", fontsize=10, color=INK, ha=side)
    handles = [bars for bars in reversed(lanes.collections) if not str(bars.get_label()).startswith("_")]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles) or 1, frameon=False, fontsize=9, columnspacing=1.3)
    figure.text(0.085, 0.94, title or "what happened when", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.085, 0.895, _moved(events), fontsize=10, color=FAINT)
    return png(figure)


def draw_lanes(axes: Axes, events: Sequence[Event], origin: float, always: Sequence[Lane] = ("read", "compute")) -> None:
    """Draw a row of bars for each kind of event that there is, seconds after `origin`, and for those of `always`."""
    lanes = {event.lane for event in events} | set(always)
    rows = [(label, kinds) for label, kinds in _ROWS if any(lane in lanes for lane, _, _ in kinds)]
    for row, (_, kinds) in enumerate(reversed(rows)):
        for lane, name, color in kinds:
            spans = [(event.start - origin, max(event.end - event.start, 0.0)) for event in events if event.lane == lane]
            # Two shades in turn tell neighbours apart; white edges would swallow bars that are only a pixel wide.
            for turn, shade in enumerate((color, _lighter(color))):
                label = name if spans and not turn else None
                axes.broken_barh(spans[turn::2], (row + 0.14, 0.72), facecolors=shade, lw=0.3, edgecolors=color, label=label)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], [label for label, _ in reversed(rows)])
    axes.set_ylim(0, len(rows))
    axes.tick_params(axis="y", length=0)
    plain(axes)
    axes.spines["left"].set_visible(False)


def _lighter(color: str) -> str:
    """The color "#rrggbb", a quarter of the way to white: not transparent, because one bar may lie over another."""
    return "#" + "".join(f"{(3 * int(color[at : at + 2], 16) + 255) // 4:02x}" for at in (1, 3, 5))


def _moved(events: Sequence[Event]) -> str:
    moved = {name: sum(event.nbytes for event in events if event.lane == lane) for _, kinds in _ROWS for lane, name, _ in kinds}
    return ", ".join(f"{name}: {format_bytes(nbytes)}" for name, nbytes in moved.items() if nbytes)
