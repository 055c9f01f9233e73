"""What a pass under given knobs takes, in bytes and seconds: the answer of `handle.predict()`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Prediction"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes and seconds of a pass at given knobs; in training of a forward with its backward.

    Attributes:
        device_bytes: weights present where the model computes at most: what always stays, and k slots.
        peak_bytes: the same with activations, and in training with what a backward and the optimizer take there.
        saved: fraction of the blocks' slots that k leaves out, 1 - k / n.
        moved_per_pass: blocks brought in per pass in the long run.
        streamed_bytes: bytes of those.
        seconds_per_pass: None before a pass was measured, like all that follow.
        resident_seconds: of a pass with all blocks present.
        slowdown: the ratio of the two.
        obeys_law: k' t_x <= (k - k') t_c.
        stall_free: whether the law promises that computing never waits.
        trains: whether this is about training.
        reserved_bytes: of that memory that k leaves to a backward and an optimizer.
    """

    k: int
    k_prime: int
    units: int
    device_bytes: int
    peak_bytes: int
    saved: float
    moved_per_pass: float
    streamed_bytes: int
    seconds_per_pass: float | None
    resident_seconds: float | None
    slowdown: float | None
    obeys_law: bool | None
    stall_free: bool | None
    trains: bool
    reserved_bytes: int

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """The same, for JSON."""
        return asdict(self)
