"""Several contenders, one checkpoint, one memory limit, alternating rounds: the memory-limit benchmark as data.

Each run is a fresh child in a fresh memory group, after the page-cache pages of every weight file have been dropped, with a raw disk
probe right before and right after. Rounds alternate and start with a different contender each time, so that a machine that changes
speed within minutes changes it for all. Figures are medians over rounds (of the median token of each run); ratios are ratios of those
medians. The physical limit of a run is `max(streamed bytes / best raw rate into memory right before or after it, time of the computation
alone)`; the rate into buffers that stay in the processor's cache, which no model can use, is reported beside it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.checkpoints import SHAPES, checkpoint, weight_files
from benchmarks.harness.contenders import OURS
from benchmarks.harness.disk import RawRate, cached_bytes, drop_cached_pages, raw_read_rate
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.statistics import ratio_of_medians, spread

__all__ = ["ALL", "FAMILIES", "Campaign", "available"]

ALL = ("torchwrap", "torchwrap-explicit", "mmap", "accelerate-disk", "accelerate-map", "airllm", "memory")
# A rival that offers several ways is represented by its fastest one.
FAMILIES = {"accelerate": ("accelerate-disk", "accelerate-map"), "mmap": ("mmap",), "airllm": ("airllm",), "memory": ("memory",)}
_NEEDS = {"accelerate-disk": "accelerate", "accelerate-map": "accelerate", "airllm": "airllm"}
UNLIMITED = frozenset({"memory"})


def available(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` whose package is installed."""
    return tuple(name for name in names if name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None)


@dataclass(kw_only=True)
class Campaign(Rounds):
    """One checkpoint under one limit.

    Args:
        shape: name in `SHAPES`.
        limit: bytes of the memory group.
        names: contenders, see `ALL`.
        prompt: tokens of the prefill.
        tokens: tokens decoded after it.
    """

    shape: str
    limit: int
    names: Sequence[str] = ALL
    prompt: int = 128
    tokens: int = 6
    probes: list[RawRate] = field(default_factory=list)
    ours = OURS

    @property
    def title(self) -> str:
        """Group name, `technique[shape@limit]`."""
        return f"offload[{self.shape}@{self.limit / 2**30:g}GiB]"

    def prepare(self) -> None:
        """Make the checkpoint and every contender's own format; not timed, not limited."""
        folder = checkpoint(self.shape)
        for name in self.names:
            self.child(name, self._command(name, folder, "--prepare"))

    def measure(self, name: str) -> dict[str, Any] | None:
        """One run between two probes of the disk."""
        folder = checkpoint(self.shape)
        work = _work(folder, name)
        files = [*weight_files(folder), *(weight_files(work) if work.exists() else [])]
        drop_cached_pages(files)
        still_cached = cached_bytes(files)
        before = raw_read_rate(files)
        options = f'{{"host_memory": {self.limit}}}' if name == "torchwrap-explicit" else "{}"
        child = self.child(name, self._command(name, folder, "--options", options), limit=None if name in UNLIMITED else self.limit)
        if child is None:
            return None
        after = raw_read_rate(files)
        self.probes += [before, after]
        rates = {"cache": [before.cache, after.cache], "memory": [before.memory, after.memory]}
        record = self.keep(name, child, {"raw_bytes_per_s": rates, "cached_bytes_at_start": still_cached})
        self.say(_line(self.title, name, record, self.seconds(record), before, after))
        return record

    def seconds(self, record: dict[str, Any]) -> float:
        """Of the median decoded token."""
        return _decode(record)

    def summary(self) -> dict[str, Any]:
        """Everything measured, with ratios of medians, equality, and promise against measurement."""
        ours = next((name for name in OURS if name in self.runs), None)
        result: dict[str, Any] = {
            **self.head(),
            "model_bytes": SHAPES[self.shape].nbytes(),
            "limit_bytes": self.limit,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "contenders": {name: _contender(records) for name, records in self.runs.items()},
            "equal_tokens": len({tuple(record["ids"]) for records in self.runs.values() for record in records}) == 1,
            "equal_logits": len({record["logit_sha256"] for records in self.runs.values() for record in records}) == 1,
            "best_raw_bytes_per_s": max((probe.memory for probe in self.probes), default=0.0),
            "raw_bytes_per_s": spread([probe.memory for probe in self.probes]),
            "raw_bytes_per_s_into_cache": spread([probe.cache for probe in self.probes]),
        }
        if ours is not None:
            mine = self.runs[ours]
            result["ours"] = ours
            result["decode_ratio"] = self._ratios(mine, _decode)
            result["prefill_ratio"] = self._ratios(mine, lambda record: record["prefill_s"])
            result["prediction"] = _prediction(mine)
            result["physics"] = self._physics(mine)
        return result

    def _ratios(self, mine: list[dict[str, Any]], seconds: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        own = [seconds(record) for record in mine]
        ratios = {
            name: ratio_of_medians([seconds(record) for record in records], own) for name, records in self.runs.items() if name not in OURS
        }
        for family, members in FAMILIES.items():
            present = [ratios[member] for member in members if member in ratios]
            if present:
                ratios[family] = min(present)
        return ratios

    def _physics(self, mine: list[dict[str, Any]]) -> dict[str, float | None]:
        """What the machine would have allowed, run by run: the disk changes its speed within minutes."""
        streamed = next((record["prediction"]["streamed_bytes"] for record in mine if record.get("prediction")), None)
        if streamed is None or not all(max(record["raw_bytes_per_s"]["memory"]) for record in mine):
            return {}
        computing = min((_decode(record) for record in self.runs.get("memory", [])), default=0.0)
        measured = [_decode(record) for record in mine]
        reading = [streamed / max(record["raw_bytes_per_s"]["memory"]) for record in mine]
        cached = [streamed / max(record["raw_bytes_per_s"]["cache"]) for record in mine]
        over = median(own / max(limit, computing) for own, limit in zip(measured, reading, strict=True))
        return {
            "streamed_bytes": streamed,
            "reading_s": median(reading),
            "computing_s": computing or None,
            "measured_s": median(measured),
            "measured_over_ideal": over,
            "fraction_of_ideal": 1 / over,
            "fraction_of_raw_probe": median(limit / own for own, limit in zip(measured, reading, strict=True)),
            "fraction_of_raw_probe_into_cache": median(limit / own for own, limit in zip(measured, cached, strict=True)),
            # Harsher: the best moment of the whole campaign as the limit of every run.
            "measured_over_best_of_all": median(measured) / max(streamed / max(probe.memory for probe in self.probes), computing),
        }

    def _command(self, name: str, folder: Path, *more: str) -> list[str]:
        base = [sys.executable, "-m", "benchmarks.harness.contenders", name, str(folder), "--work", str(_work(folder, name))]
        return [*base, "--prompt", str(self.prompt), "--tokens", str(self.tokens), *more]


def _work(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}-{name}")


def _decode(record: dict[str, Any]) -> float:
    return float(median(record["decode_s"]))


def _contender(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "decode_s": spread([_decode(record) for record in records]),
        "prefill_s": spread([record["prefill_s"] for record in records]),
        "load_s": spread([record["load_s"] for record in records]),
        "every_token_s": spread([seconds for record in records for seconds in record["decode_s"]]),
        "peak_bytes": max((record["peak_bytes"] or 0) for record in records),
        "failures": max((record["failures"] or 0) for record in records),
        "refaulted_pages": max((record["refaulted_pages"] or 0) for record in records),
        "hwm_bytes": max((record["hwm_bytes"] or 0) for record in records),
        "runs": records,
    }


def _prediction(mine: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative distance of `predict().peak_process` from the measured peaks over all runs."""
    errors: dict[str, float] = {}
    for record in mine:
        promised = (record.get("prediction") or {}).get("peak_process")
        for key in ("peak_bytes", "hwm_bytes"):
            if promised and record[key]:
                errors[f"error_{key}"] = max(errors.get(f"error_{key}", 0.0), abs(promised - record[key]) / record[key])
                errors["promised_bytes"] = promised
    return errors


def _line(title: str, name: str, record: dict[str, Any], decode_s: float, before: RawRate, after: RawRate) -> str:
    peak, hwm = (record["peak_bytes"] or 0) / 2**20, (record["hwm_bytes"] or 0) / 2**20
    return (
        f"{title} {name:19} decode {decode_s:6.3f} s/token  prefill {record['prefill_s']:6.3f} s  load {record['load_s']:5.2f} s  "
        f"peak {peak:6.0f} MiB  VmHWM {hwm:6.0f} MiB  refaults {record['refaulted_pages'] or 0:8d}  "
        f"raw {before.memory / 1e9:.2f}/{after.memory / 1e9:.2f} GB/s"
    )
