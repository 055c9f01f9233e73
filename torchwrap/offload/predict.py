"""What a forward pass will take in memory and time, from the plan and the figures measured so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from torchwrap.weights.copies import slot_bytes

if TYPE_CHECKING:
    from torchwrap.offload.handle import OffloadHandle

__all__ = ["Prediction", "predict_pass"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes and seconds of one forward pass.

    Attributes:
        peak_process: memory of the process at its highest, as limits count it.
        device_bytes: weights present on the execution device at most.
        host_bytes: weights kept in host memory for a separate device.
        disk_bytes: weights whose home is a file.
        streamed_bytes: weights fetched in one pass.
        moving_s: of bringing weights in, were there nothing to compute; None before it was measured.
        computing_s: of the pass that was measured last, had it not waited; None before one was.
        seconds_per_pass: of a steady pass; with `computing_s` None the least that one can take, None if that is not known either.
        bottleneck: what the time is spent on.
    """

    peak_process: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    streamed_bytes: int
    moving_s: float | None
    computing_s: float | None
    seconds_per_pass: float | None
    bottleneck: Literal["compute", "read", "copy"]

    def to_dict(self) -> dict[str, int | float | str | None]:
        """The same, for JSON."""
        return asdict(self)


def predict_pass(handle: OffloadHandle, *, batch: int, tokens: int, example: str | None = None) -> Prediction:
    """See `OffloadHandle.predict`."""
    stats, plan, route = handle.stats(), handle.plan, handle.route()
    separate = handle.device.type != "cpu"
    slots = plan.slots * plan.slot_bytes if separate else slot_bytes(handle.units, plan, lambda piece: not piece.resident, batch * tokens)
    rate = float(stats["bandwidth"]) if stats["disk_bytes"] else 0.0
    moving = route.pass_seconds(rate, computing=False) if route.moves(rate) else None
    computing = route.forward.forward_s if route.forward is not None else None
    bottleneck: Literal["compute", "read", "copy"] = "read" if stats["disk_bytes"] else "copy"
    if not plan.streamed_bytes or (computing is not None and computing >= (moving or 0.0)):
        bottleneck = "compute"
    return Prediction(
        peak_process=handle.baseline_bytes + slots + (0 if separate else handle.activation(batch, tokens, example)),
        device_bytes=plan.held_bytes,
        host_bytes=int(stats["host_bytes"]) + (slots if separate else 0),
        disk_bytes=int(stats["disk_bytes"]),
        streamed_bytes=plan.streamed_bytes,
        moving_s=moving,
        computing_s=computing,
        seconds_per_pass=route.pass_seconds(rate) if route.moves(rate) and (plan.streamed_bytes or computing is not None) else None,
        bottleneck=bottleneck,
    )
