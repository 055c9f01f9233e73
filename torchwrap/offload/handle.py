"""The live object of an applied `offload`: what a pass will take, and where the budget went."""

from __future__ import annotations

from torchwrap.core.config import format_bytes
from torchwrap.offload.predict import Prediction, predict_pass
from torchwrap.weights.budget import optimizer_rows
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.trial import inputs_of

__all__ = ["OffloadHandle"]


class OffloadHandle(WeightsHandle):
    """Weights of one model, of which as many as the budget allows are present; `tw.handle_of(model, "offload")` returns it."""

    def predict(self, *, batch: int | None = None, tokens: int | None = None, example: object = None) -> Prediction:
        """What a forward pass will take.

        Args:
            batch: sequences (or images) per call; None: one, or as many as the example has.
            tokens: tokens per sequence, prompt and cache included; None: 128. Not beside an example.
            example: what the model is called with, as in the settings; None: the one in the settings.

        Raises:
            ConfigError: an argument is no integer of at least 1, or an example that the model cannot be called with.

        Exactness: peak bytes within 10 % on the benchmarks of docs/figures.md. Seconds are simulated from the bandwidth seen so far and the
            computing of the last pass, whatever `batch` and `tokens` are: run one like it first. Before that, they are those of moving
            weights alone. Beside a separate device a pass is measured when `tune()` was called before it.
        """
        batch, tokens, called = inputs_of(self.config, batch, tokens, example)
        return predict_pass(self, batch=batch, tokens=tokens, example=called)

    def explain(self) -> str:
        """The division of the memory as a table, and the one change that would help most."""
        plan, stats = self.plan, self.stats()
        rows = [
            ("weights in all", stats["total_bytes"]),
            ("budget", plan.budget),
            ("always present (small or used in several places)", plan.fixed_bytes),
            ("resident", plan.resident_bytes),
            (f"{plan.slots} slots of {format_bytes(plan.slot_bytes)}", plan.slots * plan.slot_bytes),
            ("streamed in each pass", plan.streamed_bytes),
            ("tables read by row", plan.table_bytes),
            *optimizer_rows(self),
        ]
        lines = [f"{label:<52} {format_bytes(int(value)):>12}" for label, value in rows]
        if plan.streamed_bytes:
            need = plan.fixed_bytes + plan.resident_bytes + plan.streamed_bytes
            now, rate = self.predict(), float(stats["bandwidth"])
            known = "" if now.computing_s is not None else "at least "
            seconds = f", {known}{now.seconds_per_pass:.2f} s per pass at {format_bytes(int(rate))}/s" if rate else ""
            lines.append(
                f"Each extra byte of budget is one byte less to read per pass{seconds}; nothing is streamed from {format_bytes(need)} on."
            )
        else:
            lines.append("Nothing is streamed: all units are resident.")
        lines += [*self.activations.explain(), *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)
