"""What a forward pass will take in memory and time, from the plan and the figures measured so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

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
        seconds_per_pass: time of a steady pass; None before the first read gave a bandwidth.
        bottleneck: what the time is spent on.
    """

    peak_process: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    streamed_bytes: int
    seconds_per_pass: float | None
    bottleneck: Literal["compute", "read", "copy"]

    def to_dict(self) -> dict[str, int | float | str | None]:
        """The same, for JSON."""
        return asdict(self)


def predict_pass(handle: OffloadHandle, *, batch: int, tokens: int) -> Prediction:
    """See `OffloadHandle.predict`."""
    stats, plan = handle.stats(), handle.plan
    separate = handle.device.type != "cpu"
    slots = plan.slots * plan.slot_bytes
    rate = float(stats["bandwidth"])
    from_disk = int(stats["disk_bytes"]) > 0
    seconds = plan.streamed_bytes / rate if rate and from_disk else None
    if not plan.streamed_bytes:
        bottleneck: Literal["compute", "read", "copy"] = "compute"
    else:
        bottleneck = "read" if from_disk else "copy"
    return Prediction(
        peak_process=handle.baseline_bytes + slots + (0 if separate else handle.activation(batch, tokens)),
        device_bytes=plan.held_bytes,
        host_bytes=int(stats["host_bytes"]) + (slots if separate else 0),
        disk_bytes=int(stats["disk_bytes"]),
        streamed_bytes=plan.streamed_bytes,
        seconds_per_pass=seconds,
        bottleneck=bottleneck,
    )
