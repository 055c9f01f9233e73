"""Peak of weights and time of a pass over (k, k') as a picture: what each knob buys, and where the law says that computing waits.

Left, weights present at most, which only k decides, beside the whole model. Right, time of a pass over that with all blocks present, one
line for each k', filled marks where the law promises that nothing waits. Lines are predictions; crosses are runs, if any are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torchwrap.stream.picture import FAINT, INK, canvas, png

if TYPE_CHECKING:
    from torchwrap.superpipeline.prediction import Prediction

__all__ = ["draw", "grid"]

_COLORS = ("#3b7dd8", "#2a9d62", "#f2a33a", "#d8503b", "#8b5fbf", "#20262e")


def grid(units: int) -> list[tuple[int, int]]:
    """The (k, k') that are drawn: every k up to 32 of them, and k' in powers of two up to k."""
    step = -(-units // 32)
    ks = sorted({*range(1, units + 1, step), units})
    return [(k, 1 << power) for k in ks for power in range(k.bit_length())]


def draw(predictions: Sequence[Prediction], *, title: str = "", runs: Mapping[tuple[int, int], tuple[int, float]] | None = None) -> bytes:
    """Draw predictions for one model.

    Args:
        predictions: at different knobs, from `handle.predict(k=, k_prime=)`, after a pass was measured.
        title: first line of the picture.
        runs: what was measured, as {(k, k'): (bytes of weights present, seconds of a pass)}.

    Returns:
        A PNG file as bytes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install 'torchwrap[demo]'`).
    """
    runs = runs or {}
    figure = canvas(12, 5.2, 110)
    memory, time = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.975, top=0.84, bottom=0.125, wspace=0.2)
    by_k = {prediction.k: prediction for prediction in predictions}
    units = predictions[0].units
    memory.bar(list(by_k), [one.device_bytes / 2**20 for one in by_k.values()], color=_COLORS[0], alpha=0.55, label="predicted")
    memory.plot([k for k, _ in runs], [held / 2**20 for held, _ in runs.values()], "x", color=INK, ms=7, label="measured" if runs else None)
    if units in by_k:
        memory.axhline(by_k[units].device_bytes / 2**20, color=FAINT, lw=1.4, ls=(0, (5, 3)), label="all blocks present")
    memory.set_ylabel("weights present at most, MiB")
    for position, k_prime in enumerate(sorted({one.k_prime for one in predictions})):
        line = [one for one in predictions if one.k_prime == k_prime and one.slowdown is not None]
        color = _COLORS[position % len(_COLORS)]
        time.plot([one.k for one in line], [one.slowdown for one in line], color=color, lw=1.4, label=f"k' = {k_prime}")
        free = [one for one in line if one.stall_free]
        time.plot([one.k for one in free], [one.slowdown for one in free], "o", color=color, ms=5)
        resident = next((one.resident_seconds for one in line if one.resident_seconds), None)
        if resident:
            mine = [(k, seconds / resident) for (k, batch), (_, seconds) in runs.items() if batch == k_prime]
            time.plot([k for k, _ in mine], [ratio for _, ratio in mine], "x", color=color, ms=7)
    time.set_ylabel("time of a pass / with all blocks present")
    time.set_ylim(bottom=0.9)
    for axes in (memory, time):
        axes.set_xlabel("blocks present at most, k")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize=9.5)
    figure.text(0.075, 0.93, title or f"superpipeline over {units} blocks", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.075, 0.88, "dots: the law promises that computing never waits; crosses: measured", fontsize=10, color=FAINT)
    return png(figure)
