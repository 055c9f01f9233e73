"""Training under a memory limit: ours against everything in memory and against the kernel's paging, step by step the same bits.

Rounds alternate and start with a different contender each time; each run is a fresh child in a fresh memory group, after the page cache of
the checkpoint was dropped, between two probes of the disk. The first steps of a run are not counted (`WARM`): files are new and libraries
cold then. Figures are medians over all counted steps of all rounds. No time is reported unless the losses of all steps of all runs have
equal bits; DeepSpeed's own Adam rounds differently, so for it the largest relative distance of a loss is reported instead.

Overlap efficiency, the physical limit over what was measured: `max(T_io, T_compute + T_update) / T_step`, where `T_io` is what the raw
probe would take to move the same bytes, reading and writing at the same time, and `T_compute + T_update` the fastest step with
everything in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.checkpoints import SHAPES, checkpoint, weight_files
from benchmarks.harness.disk import RawMixedRate, drop_cached_pages, raw_mixed_rate
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.statistics import ratio_of_medians, spread
from benchmarks.harness.trainers import OURS
from benchmarks.harness.zero_infinity import environment, missing

__all__ = ["CONTENDERS", "TrainingCampaign"]

GIB = 1 << 30
CONTENDERS = ("torchwrap", "torchwrap-serial", "memory", "paging", "deepspeed")
# Paging gets more than ours: under our limit it takes even longer. DeepSpeed gets what it needs: it keeps the gradients of all weights in
# memory (1.3 GiB here), was ended at 3 GiB and filled 4.
LIMITS = {"torchwrap": GIB * 5 // 4, "torchwrap-serial": GIB * 5 // 4, "paging": GIB * 3 // 2, "deepspeed": GIB * 5}
INEXACT = frozenset({"deepspeed"})
WARM = 2
"""Steps before those that are counted. With one, training in memory seemed to take 3.1 s a step instead of 2.0: its second step, the
first with moments and gradients of the size that they keep, takes 4.1 to 4.3 s."""


@dataclass(kw_only=True)
class TrainingCampaign(Rounds):
    """All contenders on one checkpoint.

    Args:
        shape: name in `SHAPES`.
        names: contenders, see `CONTENDERS`.
        tokens: of the one sequence in each step.
        steps: per run; the first `WARM` are not counted.
        options: passed to our contenders.
    """

    shape: str = "llama-352M-fp32"
    names: Sequence[str] = CONTENDERS
    tokens: int = 128
    steps: int = 4
    options: dict[str, Any] = field(default_factory=lambda: {"offload": {"goal": "train"}})
    probes: list[RawMixedRate] = field(default_factory=list)
    ours = OURS

    @property
    def title(self) -> str:
        """Group name."""
        return f"training[{self.shape}@{LIMITS['torchwrap'] / GIB:g}GiB]"

    def prepare(self) -> None:
        """Make the checkpoint and DeepSpeed's operators; not timed, not limited."""
        checkpoint(self.shape)
        if "deepspeed" in self.names:
            reason = missing()
            if reason is None:
                try:
                    command = [sys.executable, "-m", "benchmarks.harness.zero_infinity"]
                    self.child("deepspeed", command, environment=environment(), timeout_s=1800)
                except RuntimeError as error:
                    reason = f"its operators cannot be built: {str(error).strip().splitlines()[-1]}"
            if reason is not None:
                self.drop("deepspeed", reason)

    def measure(self, name: str) -> dict[str, Any] | None:
        """One run between two probes of the disk."""
        folder = checkpoint(self.shape)
        work = folder.with_name(f"{folder.name}-{name}")
        shutil.rmtree(work, ignore_errors=True)
        drop_cached_pages(weight_files(folder))
        before = raw_mixed_rate(folder.parent)
        try:
            variables = environment() if name == "deepspeed" else {}
            child = self.child(name, self._command(name, folder, work), limit=LIMITS.get(name), environment=variables)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if child is None:
            return None
        after = raw_mixed_rate(folder.parent)
        self.probes += [before, after]
        rates = [[before.read, before.write], [after.read, after.write]]
        record = self.keep(name, child, {"load_average": os.getloadavg()[0], "raw_bytes_per_s": rates})
        self.say(_line(self.title, name, record))
        return record

    def seconds(self, record: dict[str, Any]) -> float:
        """Of the median step that counts."""
        return float(median(_counted(record)))

    def summary(self) -> dict[str, Any]:
        """Everything measured, and what follows from it."""
        exact = [record for name, records in self.runs.items() if name not in INEXACT for record in records]
        equal = len({tuple(record["losses"]) for record in exact}) == 1
        result: dict[str, Any] = {
            **self.head(),
            "weights_bytes": SHAPES[self.shape].nbytes(),
            "tokens": self.tokens,
            "steps": self.steps,
            "equal_losses": equal,
            "loss_distance": {name: _loss_distance(self.runs[name], exact[0]) for name in INEXACT & self.runs.keys() if exact},
            "contenders": {name: _contender(records) for name, records in self.runs.items()},
        }
        if self.probes:
            result["raw_read_bytes_per_s"] = spread([probe.read for probe in self.probes])
            result["raw_write_bytes_per_s"] = spread([probe.write for probe in self.probes])
        if not equal:
            result["losses"] = {name: [record["losses"] for record in records] for name, records in self.runs.items()}
        if equal and "torchwrap" in self.runs:
            mine = _every_step(self.runs["torchwrap"])
            result["step_ratio"] = {
                name: ratio_of_medians(_every_step(records), mine) for name, records in self.runs.items() if name != "torchwrap"
            }
            if "memory" in self.runs:
                result["slowdown_over_memory"] = 1 / result["step_ratio"]["memory"]
            result["prediction"] = _prediction(self.runs["torchwrap"])
            result["physics"] = self._physics()
        return result

    def _physics(self) -> dict[str, float | None]:
        mine = self.runs["torchwrap"]
        best = max(self.probes, key=lambda probe: probe.read + probe.write)
        read = median([value for record in mine for value in record["bytes_read"][WARM:]])
        written = median([value for record in mine for value in record["bytes_written"][WARM:]])
        moving = max(read / best.read, written / best.write) if best.read and best.write else None
        computing = min(_every_step(self.runs["memory"])) if "memory" in self.runs else None
        measured = median(_every_step(mine))
        known = [seconds for seconds in (moving, computing) if seconds is not None]
        return {
            "read_bytes_per_step": read,
            "written_bytes_per_step": written,
            "moving_s": moving,
            "computing_s": computing,
            "measured_s": measured,
            "overlap_efficiency": max(known) / measured if known else None,
        }

    def _command(self, name: str, folder: Path, work: Path) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.harness.trainers", name, str(folder), "--work", str(work)]
        options = self.options if name in OURS else {}
        return [*command, "--tokens", str(self.tokens), "--steps", str(self.steps), "--options", json.dumps(options)]


def _counted(record: dict[str, Any]) -> list[float]:
    return list(record["step_s"][WARM:])


def _every_step(records: Sequence[dict[str, Any]]) -> list[float]:
    return [seconds for record in records for seconds in _counted(record)]


def _contender(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "step_s": spread(_every_step(records)),
        "first_step_s": spread([record["step_s"][0] for record in records]),
        "load_s": spread([record["load_s"] for record in records]),
        "peak_bytes": max(record["peak_bytes"] or 0 for record in records),
        "hwm_bytes": max(record["hwm_bytes"] or 0 for record in records),
        "limit_bytes": records[0]["limit_bytes"],
        "bytes_read": median([value for record in records for value in record["bytes_read"][WARM:]]),
        "bytes_written": median([value for record in records for value in record["bytes_written"][WARM:]]),
        "refaulted_pages": max(record["refaulted_pages"] or 0 for record in records),
        "runs": records,
    }


def _prediction(mine: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative distance of what was promised from what was measured, over all runs."""
    found: dict[str, float] = {}
    for record in mine:
        promised = record.get("prediction") or {}
        for key, value in (("peak_process", record["peak_bytes"]), ("seconds_per_step", median(_counted(record)))):
            if promised.get(key) and value:
                found[f"error_{key}"] = max(found.get(f"error_{key}", 0.0), abs(promised[key] - value) / value)
                found[key] = promised[key]
    return found


def _loss_distance(records: list[dict[str, Any]], reference: dict[str, Any]) -> float:
    """Largest relative distance of a loss from the exact one of the same step."""
    expected = [float.fromhex(loss) for loss in reference["losses"]]
    return max(
        abs(float.fromhex(loss) - value) / abs(value) for record in records for loss, value in zip(record["losses"], expected, strict=True)
    )


def _line(title: str, name: str, record: dict[str, Any]) -> str:
    seconds, peak, raw = median(_counted(record)), (record["peak_bytes"] or 0) / 2**20, record["raw_bytes_per_s"][0]
    return (
        f"{title} {name:<17} {seconds:6.2f} s/step (first {record['step_s'][0]:.2f})  peak {peak:5.0f} MiB  read "
        f"{record['bytes_read'][-1] / 1e9:5.2f} GB  written {record['bytes_written'][-1] / 1e9:5.2f} GB  "
        f"raw {raw[0] / 1e9:.1f}+{raw[1] / 1e9:.1f} GB/s  load {record['load_average']:.1f}"
    )
