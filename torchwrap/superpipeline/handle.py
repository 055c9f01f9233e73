"""The live object of an applied `superpipeline`: the knobs, figures, predictions for any knobs, and the choice made after measuring."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.core.tensors import bind
from torchwrap.stream.batches import Batches
from torchwrap.stream.pieces import copy_of
from torchwrap.superpipeline.config import Superpipeline
from torchwrap.superpipeline.measure import Meter
from torchwrap.superpipeline.picture import draw, grid
from torchwrap.superpipeline.policy import Choice, Knobs, Profile, choose, obeys_law, stall_free
from torchwrap.weights.budget import optimizer_rows
from torchwrap.weights.handle import WeightsHandle

__all__ = ["Prediction", "SuperpipelineHandle"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes and seconds of a pass at given knobs.

    Attributes:
        device_bytes: weights present where the model computes at most: what always stays, and k slots.
        peak_bytes: the same with activations.
        saved: fraction of the blocks' slots that k leaves out, 1 - k / n.
        moved_per_pass: blocks brought in per forward pass in the long run.
        streamed_bytes: bytes of those.
        seconds_per_pass: None before a pass was measured, like all that follow.
        resident_seconds: of a pass with all blocks present.
        slowdown: the ratio of the two.
        obeys_law: k' t_x <= (k - k') t_c.
        stall_free: whether the law promises that computing never waits.
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

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """The same, for JSON."""
        return asdict(self)


class SuperpipelineHandle(WeightsHandle):
    """Blocks of one model of which at most k are present.

    Attributes:
        knobs: k, k' and the number of blocks, as they are now.
        chosen: what "auto" chose; None before, or if there was nothing to choose.
        profile: the measured times; None before a pass was measured: the second one with "auto", else the one after `tune()`.
    """

    config: Superpipeline
    knobs: Knobs
    slot_bytes: int = 0
    block_bytes: int = 0
    allowed: Sequence[int] = ()
    meter: Meter | None = None
    chosen: Choice | None = None

    def configure(self, knobs: Knobs, *, slot_bytes: int, block_bytes: int, allowed: Sequence[int]) -> None:
        """Take over what the technique worked out.

        Args:
            knobs: to begin with.
            slot_bytes: of one slot.
            block_bytes: of all blocks together.
            allowed: values of k that memory allows, smallest first.
        """
        self.knobs, self.slot_bytes, self.block_bytes, self.allowed = knobs, slot_bytes, block_bytes, allowed
        if self.engine is not None:
            self.engine.batches = Batches(knobs.k_prime)
            self.meter = Meter(self.engine, self.device, armed=self.config.chooses)

    @property
    def profile(self) -> Profile | None:
        """Measured times of a pass."""
        return self.meter.profile if self.meter is not None else None

    # -- choosing ------------------------------------------------------------------------------------------------------------------

    def pass_begun(self) -> None:
        """Called by the root's layer."""
        if self.meter is not None and not self._in_turns():
            self.meter.pass_begun()

    def pass_ended(self, *, whole: bool) -> None:
        """Called by the root's layer, with the model's lock."""
        if self.meter is None or self._in_turns() or not self.meter.pass_ended(whole=whole):
            return
        profile, setting = self.profile, self.config
        if profile is None or not self.plan.slots or not setting.chooses:
            return
        chosen = choose(
            profile,
            max_slowdown=setting.max_slowdown,
            allowed=self.allowed,
            k=min(setting.k, profile.units) if isinstance(setting.k, int) else None,
            k_prime=min(setting.k_prime, profile.units) if isinstance(setting.k_prime, int) else None,
        )
        # A pass may leave blocks out (a decoder's, of a model with an encoder): k is then a window over those it uses.
        k = setting.k if isinstance(setting.k, int) else chosen.k
        self.chosen = Choice(k, chosen.k_prime, chosen.slowdown)
        self.turn(k, chosen.k_prime)

    def _in_turns(self) -> bool:
        """Whether this pass is one of several that go through the blocks together; what such a pass takes says nothing."""
        return self.engine is not None and self.engine.turns is not None

    def tune(self) -> None:
        """Measure the next pass, which makes it slower; "auto" chooses again by it, for inputs of another size, say."""
        with self.lock:
            if self.meter is not None:
                self.meter.arm()

    def turn(self, k: int, k_prime: int) -> None:
        """Set the knobs, between passes. Cost: what was read ahead is read again.

        Raises:
            ConfigError: not 1 <= k' <= k <= n, or fewer than all after all were kept.
            BudgetError: memory, or `device_memory`, does not hold k blocks.
        """
        knobs = Knobs(k, k_prime, self.knobs.units)
        if k not in self.allowed:
            raise errors.BudgetError(
                f"superpipeline: k={k} blocks need {format_bytes(self._held(knobs))}, and {format_bytes(self.plan.budget)} are allowed",
                needed=self._held(knobs),
                available=self.plan.budget,
                where="k",
                fix=f"Use one of k={', '.join(map(str, self.allowed))}, or apply it again with a larger device_memory.",
            )
        with self.lock:
            if not self.plan.slots and knobs.k < knobs.units:
                raise errors.ConfigError(
                    f"superpipeline: all {knobs.units} blocks are kept, they cannot be sent away again",
                    where="k",
                    fix=f'Call torchwrap.unwrap(model, "superpipeline") and apply it with k={knobs.k}.',
                )
            if self.plan.slots and knobs_keep_all(knobs):
                self._keep_all()
            elif self.engine is not None and knobs.k != self.knobs.k:
                self.plan = dataclasses.replace(self.plan, slots=knobs.k)
                self.engine.resize(self.plan)
            if self.engine is not None:
                self.engine.batches = Batches(knobs.k_prime)
            self.activations.replan(self.plan)
            self.knobs = knobs

    @torch.inference_mode(False)
    @torch.no_grad()
    def _keep_all(self) -> None:
        """Every block a place of its own, and nothing to do for its layers."""
        assert self.engine is not None
        self.engine.trim()
        for piece in self.pieces:
            if not piece.resident:
                bind(piece.parameter, copy_of(self.engine.read(piece).to(self.device), piece.residue))
                piece.resident = True
                self.engine.stay(piece)
        everything = frozenset(piece.index for piece in self.pieces)
        self.plan = dataclasses.replace(
            self.plan, resident=everything, resident_bytes=self.block_bytes, slots=0, slot_bytes=0, streamed_bytes=0
        )
        self.engine.resize(self.plan)

    # -- figures -------------------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Counters since wrapping. Bytes, seconds and counts, by name."""
        transfers = int(self.engine.counters["reads"]) if self.engine is not None else 0
        return {**super().stats(), "k": self.knobs.k, "k_prime": self.knobs.k_prime, "units": self.knobs.units, "transfers": transfers}

    def bytes_moved(self) -> int:
        """Bytes of blocks brought in per forward pass in the long run."""
        return self._moved(self.knobs)

    def predict(self, *, batch: int = 1, tokens: int = 128, k: int | None = None, k_prime: int | None = None) -> Prediction:
        """What a forward pass takes, with the knobs as they are or with others.

        Args:
            batch: sequences (or images) per call.
            tokens: tokens per sequence.
            k: None: as it is; given alone, k' is at most as it is.
            k_prime: None: as it is.

        Raises:
            ConfigError: not 1 <= k' <= k <= n, or another argument is no number of at least 1.

        Exactness: bytes of weights are counted, those of activations estimated; seconds are simulated from the measured pass.
        """
        for name, value in (("batch", batch), ("tokens", tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise errors.ConfigError(f"superpipeline: {name}={value!r}", where=name, fix="Use an integer of at least 1.")
        if k is None:
            k = self.knobs.k
        elif k_prime is None:
            k_prime = min(Knobs(k, 1, self.knobs.units).k, self.knobs.k_prime)
        knobs = Knobs(k, self.knobs.k_prime if k_prime is None else k_prime, self.knobs.units)
        device_bytes = self._held(knobs)
        known = self.profile
        seconds = known.pass_seconds(knobs.k, knobs.k_prime) if known else None
        mean_c = sum(known.compute_s) / known.units if known else 0.0
        mean_x = sum(known.transfer_s) / known.units if known else 0.0
        return Prediction(
            k=knobs.k,
            k_prime=knobs.k_prime,
            units=knobs.units,
            device_bytes=device_bytes,
            peak_bytes=device_bytes + self.activation(batch, tokens),
            saved=knobs.saved,
            moved_per_pass=knobs.moved_per_pass,
            streamed_bytes=self._moved(knobs),
            seconds_per_pass=seconds,
            resident_seconds=known.resident_s if known else None,
            slowdown=seconds / known.resident_s if known and seconds is not None else None,
            obeys_law=obeys_law(knobs, mean_c, mean_x) if known else None,
            stall_free=stall_free(knobs, mean_c, mean_x) if known else None,
        )

    def explain(self) -> str:
        """The window as a table, and the one change that would help most."""
        knobs, now = self.knobs, self.predict()
        rows = [
            ("blocks", f"{knobs.units} of {format_bytes(self.slot_bytes)} at most"),
            ("present at once (k)", f"{knobs.k}"),
            ("handed on together (k')", f"{knobs.k_prime}"),
            ("always present", format_bytes(self.plan.fixed_bytes)),
            ("present at most, in all", format_bytes(now.device_bytes)),
            ("saved of the blocks", f"{knobs.saved:.0%}"),
            ("brought in per pass", f"{knobs.moved_per_pass:g} blocks, {format_bytes(now.streamed_bytes)}"),
            *((label, format_bytes(nbytes)) for label, nbytes in optimizer_rows(self)),
        ]
        lines = [f"{label:<28} {value}" for label, value in rows]
        lines += [*self.activations.explain(), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*lines, self._advice(now)])

    def _advice(self, now: Prediction) -> str:
        known = self.profile
        if knobs_keep_all(self.knobs):
            return "Nothing is streamed: all blocks are present."
        if known is None:
            return "No pass was measured yet: call tune() and run one."
        mean_c, mean_x = (1e3 * sum(times) / known.units for times in (known.compute_s, known.transfer_s))
        lines = [
            f"{mean_c:.2f} ms compute a block, {mean_x:.2f} ms bring one in; predicted slow-down {now.slowdown:.2f}."
            + (" The law holds: computing does not wait." if now.stall_free else "")
        ]
        if not now.stall_free:
            best = choose(known, max_slowdown=1.0, allowed=self.allowed)
            if best.slowdown < 0.99 * (now.slowdown or math.inf):
                lines.append(f"What would help most: k={best.k}, k_prime={best.k_prime}, slow-down {best.slowdown:.2f}.")
            elif self.allowed[-1] < self.knobs.units:
                lines.append("Bringing blocks in is the slower side: only more memory (device_memory=) or larger inputs help.")
            else:
                lines.append(f"Bringing blocks in is the slower side: larger inputs help, or k={self.knobs.units}.")
        return "\n".join(lines)

    def picture(self, title: str = "") -> bytes:
        """Predicted peak of weights and time of a pass over (k, k'), as a PNG file; times after a pass was measured.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return draw([self.predict(k=k, k_prime=k_prime) for k, k_prime in grid(self.knobs.units)], title=title)

    def _held(self, knobs: Knobs) -> int:
        return self.plan.fixed_bytes + (self.block_bytes if knobs_keep_all(knobs) else knobs.k * self.slot_bytes)

    def _moved(self, knobs: Knobs) -> int:
        return int(self.block_bytes * knobs.moved_per_pass / knobs.units)

    # -- copies and moves ------------------------------------------------------------------------------------------------------------

    def inert(self) -> SuperpipelineHandle:
        made = super().inert()
        assert isinstance(made, SuperpipelineHandle)
        made.configure(self.knobs, slot_bytes=0, block_bytes=0, allowed=self.allowed)
        return made

    def twin(self, parameters: dict[int, nn.Parameter]) -> SuperpipelineHandle:
        made = super().twin(parameters)
        assert isinstance(made, SuperpipelineHandle)
        made.configure(self.knobs, slot_bytes=self.slot_bytes, block_bytes=self.block_bytes, allowed=self.allowed)
        return made

    def replan(self) -> None:
        super().replan()
        if self.plan.slots:
            self.slot_bytes = self.plan.slot_bytes
        self.block_bytes = sum(piece.nbytes for unit in self.units for piece in unit.pieces)

    def rehome(self, device: Any) -> None:
        super().rehome(device)
        if self.engine is not None:
            self.meter = Meter(self.engine, device, armed=self.config.chooses)


def knobs_keep_all(knobs: Knobs) -> bool:
    """Whether every block has a place."""
    return knobs.k == knobs.units
