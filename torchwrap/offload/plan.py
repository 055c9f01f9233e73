"""What `offload` would do with a checkpoint folder, from its config and headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchwrap.activations.expected import in_words, swapped_bytes
from torchwrap.core.config import format_bytes
from torchwrap.core.integration import Integration, integration_for_folder
from torchwrap.offload.config import Offload
from torchwrap.offload.technique import offload
from torchwrap.storage.aio import probe
from torchwrap.stream.units import Piece
from torchwrap.weights.blueprint import Blueprint
from torchwrap.weights.budget import RESERVE_TOKENS, process_bytes, working_bytes
from torchwrap.weights.copies import slot_bytes
from torchwrap.weights.folder import WorkFolder, as_placeholders
from torchwrap.weights.footprint import expected_footprint
from torchwrap.weights.timing import check_inputs, route_of
from torchwrap.weights.training import TrainingPrediction, forecast, training_of

__all__ = ["FolderPlan", "plan_folder"]


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """How a folder's weights would be divided. Bytes, unless the name says otherwise.

    Attributes:
        held_bytes: present at once where the model computes.
        streamed_bytes: fetched for each token, or each pass.
        table_bytes: embeddings of which only rows are read.
        bandwidth: bytes per second that the disk gave just now.
        seconds_per_token: of a decoded token when reading is what takes the time; 0 if nothing is streamed.
        working_bytes: memory that a forward of these inputs takes besides weights.
        reserve: memory that the budget leaves to activations and caches.
        training: a training step by the named `optimizer` on these inputs, if that is the goal; without seconds of computing.
    """

    model: str
    device: str
    total_bytes: int
    budget: int
    fixed_bytes: int
    resident_bytes: int
    slots: int
    slot_bytes: int
    held_bytes: int
    streamed_bytes: int
    table_bytes: int
    bandwidth: float
    seconds_per_token: float
    working_bytes: int
    reserve: int
    training: TrainingPrediction | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = {
            "weights": self.total_bytes,
            "budget": self.budget,
            "always present": self.fixed_bytes,
            "resident": self.resident_bytes,
            f"{self.slots} slots": self.slots * self.slot_bytes,
            "present at once": self.held_bytes,
            "streamed per token": self.streamed_bytes,
            "tables read by row": self.table_bytes,
            "a forward's memory": self.working_bytes,
        }
        lines = [f"{self.model} on {self.device}"] + [f"  {label:<20} {format_bytes(value):>12}" for label, value in rows.items()]
        speed = (
            f"{self.seconds_per_token:.3f} s per token at {format_bytes(int(self.bandwidth))}/s"
            if self.streamed_bytes
            else "nothing is streamed"
        )
        lines += [f"  {speed}", *([str(self.training)] if self.training is not None else [])]
        working = max(self.working_bytes, self.training.working_bytes if self.training is not None else 0)
        if working > self.reserve:
            lines.append(f"  {format_bytes(self.reserve)} are left to that beside the weights: pass reserve={working} for such inputs")
        return "\n".join(lines)


@torch.inference_mode(False)
def plan_folder(folder: str | Path, config: Offload, *, batch: int = 1, tokens: int = RESERVE_TOKENS) -> FolderPlan:
    """Plan without loading.

    Args:
        folder: a checkpoint that an installed integration can build.
        config: the settings `offload` would get.
        batch, tokens: sequences per call and tokens of each.

    Raises:
        ConfigError: `batch` or `tokens` is no integer of at least 1.
        BudgetError: the budget is below what one unit needs; carries the smallest that works.
        UnsupportedModelError: no integration can build the model.

    Cost: the headers, and a third of a second of reading for the bandwidth.
    """
    check_inputs("offload", batch, tokens)
    path = Path(folder)
    integration = integration_for_folder(path)
    work = WorkFolder(config)
    try:
        model, homes = as_placeholders(integration.skeleton(path, work), path)
        blueprint: Blueprint = offload.prepare(model, config, integration).data
        largest = max((home.file for home in homes.values()), key=lambda file: file.path.stat().st_size)
        plan = blueprint.plan
        bandwidth = probe(largest).bytes_per_s if plan.streamed_bytes else 0.0  # type: ignore[arg-type]
        return FolderPlan(
            model=type(model).__name__,
            device=str(blueprint.device),
            total_bytes=sum(piece.nbytes for piece in blueprint.division.pieces),
            budget=plan.budget,
            fixed_bytes=plan.fixed_bytes,
            resident_bytes=plan.resident_bytes,
            slots=plan.slots,
            slot_bytes=plan.slot_bytes,
            held_bytes=plan.held_bytes,
            streamed_bytes=plan.streamed_bytes,
            table_bytes=plan.table_bytes,
            bandwidth=bandwidth,
            seconds_per_token=plan.streamed_bytes / bandwidth if bandwidth else 0.0,
            working_bytes=_working(model, integration, blueprint, batch, tokens),
            reserve=blueprint.budget.reserve,
            training=_training(model, blueprint, integration, bandwidth, config, batch, tokens) if config.goal == "train" else None,
        )
    finally:
        work.close()


def _training(
    model: nn.Module, blueprint: Blueprint, integration: Integration, bandwidth: float, config: Offload, batch: int, tokens: int
) -> TrainingPrediction:
    """A step; writing is taken to be as fast as reading."""
    division, plan = blueprint.division, blueprint.plan

    def activation(batch: int, tokens: int) -> int:
        return _working(model, integration, blueprint, batch, tokens)

    fixed = {piece.index for piece in division.fixed}
    resident = plan.resident | fixed
    footprint = expected_footprint(division.units, division.pieces, resident, config.optimizer)
    separate = blueprint.device.type != "cpu"

    def away(piece: Piece) -> bool:
        return piece.index not in resident

    slots = plan.slots * plan.slot_bytes if separate else slot_bytes(division.units, plan, away, batch * tokens)
    training = training_of(division.units, division.pieces, config, config.activations, blueprint.rehearsal)
    trial = blueprint.trial
    working = (
        training.working(activation, batch, tokens) if trial is None else trial.step_bytes(trial.example, training.choice, blueprint.copies)
    )
    return forecast(
        footprint,
        route_of(division.units, plan.slots, away),
        present=process_bytes() + slots + (0 if separate else plan.fixed_bytes + plan.resident_bytes),
        slots=slots,
        working=0 if separate else working,
        copied=(0, 0) if separate else (blueprint.copies.at(batch * tokens), training.inside),
        weights=2 * plan.streamed_bytes,
        read_rate=bandwidth,
        write_rate=bandwidth,
        computing=None,
        swapped=swapped_bytes(division.units, batch * tokens, config.activations),
        to_disk=not separate or config.activations == "disk",
        activations=in_words(config.activations),
    )


def _working(model: nn.Module, integration: Integration, blueprint: Blueprint, batch: int, tokens: int) -> int:
    """Of a forward, like the example in the settings if there is one."""
    trial, copies = blueprint.trial, blueprint.copies
    if trial is not None:
        return trial.forward_bytes(trial.example, copies)
    return working_bytes(model, integration, batch=batch, tokens=tokens, scratch=copies.at(batch * tokens))
