"""The live object of an applied `superpipeline`: the knobs, figures, predictions for any knobs, and the choice made after measuring."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.core.tensors import bind
from torchwrap.stream.batches import Batches
from torchwrap.stream.pieces import copy_of
from torchwrap.superpipeline.config import Superpipeline
from torchwrap.superpipeline.picture import draw, grid
from torchwrap.superpipeline.policy import Choice, Knobs, Profile, choose, obeys_law, stall_free
from torchwrap.superpipeline.prediction import Prediction
from torchwrap.superpipeline.room import Room
from torchwrap.weights.budget import count_libraries, optimizer_rows
from torchwrap.weights.footprint import Footprint
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.measure import Meter
from torchwrap.weights.training import head_bytes, predict_step, step_bytes
from torchwrap.weights.trial import inputs_of

__all__ = ["Prediction", "SuperpipelineHandle"]


class SuperpipelineHandle(WeightsHandle):
    """Blocks of one model of which at most k are present.

    Attributes:
        knobs: k, k' and the number of blocks, as they are now.
        room: how far they can be turned.
        chosen: what "auto" chose; None before, or if there was nothing to choose.
        profile: the measured times; None before a pass was measured: the second one with "auto", else the one after `tune()`.
    """

    config: Superpipeline
    knobs: Knobs
    room: Room
    chosen: Choice | None = None
    _unchosen: bool = False  # a pass was measured, and the knobs are chosen by it before the next
    _made_room: bool = False  # for the optimizer that is open, though no training pass was measured yet

    def configure(self, knobs: Knobs, room: Room) -> None:
        """Take over what the technique worked out: the knobs to begin with, and how far they can be turned."""
        self.knobs, self.room = knobs, room
        if self.engine is not None:
            self.engine.batches = Batches(knobs.k_prime)

    def _new_meter(self) -> Meter | None:
        return Meter(self.engine, self.device, apart=True, armed=self.config.chooses) if self.engine is not None else None

    @property
    def profile(self) -> Profile | None:
        """Measured times of a pass."""
        times = self.meter.times if self.meter is not None else None
        known = Profile.of(times, {unit.index: unit.nbytes for unit in self.units}) if times is not None else None
        return dataclasses.replace(known, update_s=self._update_s(known.units)) if known is not None and known.trains else known

    @property
    def trains(self) -> bool:
        """Whether choices and predictions are about training: as `train` says, else as the last measured pass was."""
        if self.config.train is not None:
            return self.config.train
        return self._made_room or (self.meter is not None and self.meter.times is not None and bool(self.meter.times.backward))

    @property
    def allowed(self) -> tuple[int, ...]:
        """Values of k that memory holds beside what else is wanted now, smallest first."""
        return self.room.allowed(trains=self.trains, opened=self._opened())

    def _opened(self) -> Footprint | None:
        optimizer = self.optimizer()
        return optimizer.footprint() if optimizer is not None and self.driven else None

    def _update_s(self, units: int) -> tuple[float, ...]:
        """For each block, seconds in which the optimizer that is open keeps the disk busy that blocks come from; () if none is open."""
        optimizer = self.optimizer()
        if optimizer is None or not self.driven:
            return ()
        figures, moved = self.stats(), optimizer.footprint()
        rate = float(figures["bandwidth"])
        if not figures["disk_bytes"] or not rate:
            return (0.0,) * units
        return ((moved.read / rate + moved.written / (optimizer.write_rate or rate)) / units,) * units

    # -- choosing ------------------------------------------------------------------------------------------------------------------

    def before_pass(self, module: nn.Module) -> None:
        """Called by the root's layer before a pass: the knobs that a training pass asked for are set now.

        Between a step and the next forward no weight is on its way to an optimizer.
        """
        meter = self.meter
        if meter is None or not self.config.chooses or not self.plan.slots or self._in_turns():
            return
        self.backward.settle()
        with self.lock:
            if meter.inside or self.backward.running or self.stepping:
                return
            if self._unchosen:
                self._choose()
            elif self._begins_training(module):
                self._make_room()

    def pass_begun(self, module: nn.Module) -> None:
        """Called by the root's layer."""
        if self.meter is not None and not self._in_turns():
            self.meter.pass_begun(
                wanted=not self.backward.running and (torch.is_grad_enabled() or not (self.config.train or self._made_room))
            )

    def pass_ended(self, module: nn.Module, *, whole: bool) -> None:
        """Called by the root's layer, with the model's lock, when nothing of the pass is in use any more."""
        if self.meter is None or self._in_turns():
            return
        follows = self._may_train(module)
        if self.meter.pass_ended(whole=whole, backward=follows):
            self._unchosen = self.config.chooses
            if self._unchosen and not follows:
                self._choose()

    def _may_train(self, module: nn.Module) -> bool:
        """Whether a backward is to be expected of the pass that runs: nothing tells for sure before it comes."""
        wanted = self.config.train if self.config.train is not None else module.training
        return wanted and torch.is_grad_enabled()

    def _begins_training(self, module: nn.Module) -> bool:
        """Whether the pass is the first of training, and memory was divided as for forwards so far."""
        return self.config.train is None and not self.trains and self.driven and self._may_train(module)

    def _make_room(self) -> None:
        """From now on for training: no more blocks than that leaves room for, and what was chosen for forwards is chosen again."""
        self._made_room = True
        setting, allowed = self.config, self.allowed
        if setting.k == "auto":
            k = max((other for other in allowed if other <= self.knobs.k), default=1)
            k = max(k, setting.k_prime if isinstance(setting.k_prime, int) else 1)
            if k != self.knobs.k:
                self._turn(Knobs(k, min(k, self.knobs.k_prime), self.knobs.units))
        if self.chosen is not None and self.meter is not None:
            self.meter.arm()

    def _choose(self) -> None:
        """Set the knobs by the measured pass."""
        self._unchosen = False
        profile, setting = self.profile, self.config
        if profile is None or not self.plan.slots:
            return
        chosen = choose(
            profile,
            max_slowdown=setting.max_slowdown,
            allowed=self.allowed or (1,),
            k=min(setting.k, profile.units) if isinstance(setting.k, int) else None,
            k_prime=min(setting.k_prime, profile.units) if isinstance(setting.k_prime, int) else None,
        )
        # A pass may leave blocks out (a decoder's, of a model with an encoder): k is then a window over those it uses.
        k = setting.k if isinstance(setting.k, int) else chosen.k
        self.chosen = Choice(k, chosen.k_prime, chosen.slowdown)
        self._turn(Knobs(k, chosen.k_prime, self.knobs.units))

    def tune(self) -> None:
        """Measure the next pass, which makes it slower; "auto" chooses again by it, for inputs of another size, say.

        With `train=None` that pass decides anew whether it is about training; with `train=True` it is the next one with gradients.
        """
        with self.lock:
            self._made_room = False
            if self.meter is not None:
                self.meter.arm()

    def turn(self, k: int, k_prime: int) -> None:
        """Set the knobs, between passes. Cost: what was read ahead is read again.

        Raises:
            ConfigError: not 1 <= k' <= k <= n, or fewer than all after all were kept.
            BudgetError: memory, or `device_memory`, does not hold k blocks beside what training takes, if the model is trained.
        """
        knobs, allowed = Knobs(k, k_prime, self.knobs.units), self.allowed
        if k not in allowed:
            needed, limit = self.room.needed(k, trains=self.trains), self.room.limit(trains=self.trains, opened=self._opened())
            raise errors.BudgetError(
                f"superpipeline: k={k} blocks need {format_bytes(needed)}, and {format_bytes(limit)} are allowed",
                needed=needed,
                available=limit,
                where="k",
                fix=(f"Use one of k={', '.join(map(str, allowed))}, or apply" if allowed else "Apply")
                + " it again with a larger device_memory.",
            )
        self._turn(knobs)

    def _turn(self, knobs: Knobs) -> None:
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
            self.plan, resident=everything, resident_bytes=self.room.block_bytes, slots=0, slot_bytes=0, streamed_bytes=0
        )
        self.engine.resize(self.plan)

    # -- figures -------------------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Counters since wrapping. Bytes, seconds and counts, by name."""
        transfers = int(self.engine.counters["reads"]) if self.engine is not None else 0
        return {**super().stats(), "k": self.knobs.k, "k_prime": self.knobs.k_prime, "units": self.knobs.units, "transfers": transfers}

    def bytes_moved(self) -> int:
        """Bytes of blocks brought in per forward pass in the long run."""
        return int(self.room.block_bytes * self.knobs.moved_per_pass / self.knobs.units)

    def predict(
        self,
        *,
        batch: int | None = None,
        tokens: int | None = None,
        k: int | None = None,
        k_prime: int | None = None,
        example: object = None,
    ) -> Prediction:
        """What a pass takes, with the knobs as they are or with others: a forward, or a forward and its backward if `trains`.

        Args:
            batch: sequences (or images) per call; None: one, or as many as the example has.
            tokens: tokens per sequence; None: 128. Not beside an example.
            k: None: as it is; given alone, k' is at most as it is.
            k_prime: None: as it is.
            example: what the model is called with, as in the settings; None: the one in the settings.

        Raises:
            ConfigError: not 1 <= k' <= k <= n, or another argument is no number of at least 1.

        Exactness: bytes of weights are counted, those of activations estimated; seconds are simulated from the measured pass.
        """
        batch, tokens, called = inputs_of(self.config, batch, tokens, example)
        if k is None:
            k = self.knobs.k
        elif k_prime is None:
            k_prime = min(Knobs(k, 1, self.knobs.units).k, self.knobs.k_prime)
        knobs = Knobs(k, self.knobs.k_prime if k_prime is None else k_prime, self.knobs.units)
        device_bytes, known, opened = self.room.held(knobs.k), self.profile, self._opened()
        seconds = known.pass_seconds(knobs.k, knobs.k_prime) if known else None
        mean_c, mean_x = _means(known) if known else (0.0, 0.0)
        working, reserved, moved = self.activation(batch, tokens, called), 0, knobs.moved_per_pass
        if self.trains:
            count_libraries(self)
            step = predict_step(self, batch=batch, tokens=tokens, example=called)
            working = step.working_bytes  # 0 if that is not where the model computes
            if not working and called is not None and self.activation.trial is not None:
                working = self.activation.trial.step_bytes(called, self.activations.mode)
            working = working or step_bytes(self.activation, head_bytes(self.units, self.pieces), batch, tokens)
            reserved = working + self.room.optimizer_bytes(opened)
            if opened is None or not knobs_keep_all(self.knobs):  # else the open optimizer counts the gradients of blocks that stay
                reserved += self.room.needed(knobs.k, trains=True) - device_bytes
            moved = knobs.moved_per_update if opened is not None else knobs.moved_per_step
        return Prediction(
            k=knobs.k,
            k_prime=knobs.k_prime,
            units=knobs.units,
            device_bytes=device_bytes,
            peak_bytes=device_bytes + max(working, reserved),
            saved=knobs.saved,
            moved_per_pass=moved,
            streamed_bytes=int(self.room.block_bytes * moved / knobs.units),
            seconds_per_pass=seconds,
            resident_seconds=known.resident_s if known else None,
            slowdown=seconds / known.resident_s if known and seconds is not None else None,
            obeys_law=obeys_law(knobs, mean_c, mean_x) if known else None,
            stall_free=stall_free(knobs, mean_c, mean_x) and not (moved and known.update_s) if known else None,
            trains=self.trains,
            reserved_bytes=reserved,
        )

    def explain(self) -> str:
        """The window as a table, and the one change that would help most."""
        knobs, now = self.knobs, self.predict()
        rows = [
            ("blocks", f"{knobs.units} of {format_bytes(self.room.slot_bytes)} at most"),
            ("present at once (k)", f"{knobs.k}"),
            ("handed on together (k')", f"{knobs.k_prime}"),
            ("always present", format_bytes(self.plan.fixed_bytes)),
            ("present at most, in all", format_bytes(now.device_bytes)),
            ("saved of the blocks", f"{knobs.saved:.0%}"),
            ("brought in per pass", f"{now.moved_per_pass:g} blocks, {format_bytes(now.streamed_bytes)}"),
            *([("left to a training step", self.room.reserved(self._opened()))] if self.trains else []),
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
        mean_c, mean_x, mean_b = (1e3 * sum(times) / known.units for times in (known.compute_s, known.transfer_s, known.backward_s))
        lines = [
            f"{mean_c:.2f} ms compute a block{f', {mean_b:.2f} ms its backward' if known.trains else ''}, {mean_x:.2f} ms bring one in; "
            f"predicted slow-down {now.slowdown:.2f}." + (" The law holds: computing does not wait." if now.stall_free else "")
        ]
        if not now.stall_free:
            allowed = self.allowed or (self.knobs.k,)
            best = choose(known, max_slowdown=1.0, allowed=allowed)
            if best.slowdown < 0.99 * (now.slowdown or math.inf):
                lines.append(f"What would help most: k={best.k}, k_prime={best.k_prime}, slow-down {best.slowdown:.2f}.")
            elif allowed[-1] < self.knobs.units:
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

    # -- copies and moves ------------------------------------------------------------------------------------------------------------

    def inert(self) -> SuperpipelineHandle:
        made = super().inert()
        assert isinstance(made, SuperpipelineHandle)
        made.configure(self.knobs, dataclasses.replace(self.room, fixed_bytes=0, slot_bytes=0, block_bytes=0))
        return made

    def twin(self, parameters: dict[int, nn.Parameter]) -> SuperpipelineHandle:
        made = super().twin(parameters)
        assert isinstance(made, SuperpipelineHandle)
        made.configure(self.knobs, dataclasses.replace(self.room))
        return made

    def replan(self) -> None:
        super().replan()
        blocks = [piece for unit in self.units for piece in unit.pieces]
        self.room = dataclasses.replace(
            self.room,
            fixed_bytes=self.plan.fixed_bytes,
            slot_bytes=self.plan.slot_bytes if self.plan.slots else self.room.slot_bytes,
            block_bytes=sum(piece.nbytes for piece in blocks),
            gradient_bytes=sum(piece.nbytes for piece in blocks if piece.parameter.requires_grad),
        )


def _means(profile: Profile) -> tuple[float, float]:
    """Seconds to compute and to bring in a block, on average; in training those of the direction that computes less."""
    computing = min(sum(profile.compute_s), sum(profile.backward_s)) if profile.trains else sum(profile.compute_s)
    return computing / profile.units, sum(profile.transfer_s) / profile.units


def knobs_keep_all(knobs: Knobs) -> bool:
    """Whether every block has a place."""
    return knobs.k == knobs.units
