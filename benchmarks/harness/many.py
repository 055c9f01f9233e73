"""Several sequences through one streamed model: together (`forward_many`), and one after another.

Each way is a fresh child under the same memory limit; `memory`, all weights in memory without a limit, is the floor of the computation.
A child prefills every sequence and decodes greedily; the figure is decoded tokens per second over all sequences, prefill excluded, and
the other figure the seconds of everything. Token ids of all ways must be equal. Physics: a step of all sequences together cannot be
shorter than reading the weights once, nor than computing every sequence, so where the disk is fast the gain ends at the computation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.cgroup import report
from benchmarks.harness.checkpoints import SHAPES, checkpoint, weight_files
from benchmarks.harness.contenders import CONTENDERS, declare_torchvision_operators
from benchmarks.harness.disk import drop_cached_pages, raw_read_rate
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.statistics import ratio_of_medians, spread

__all__ = ["WAYS", "ManyCampaign", "main"]

WAYS = ("together", "single", "memory")


@dataclass(kw_only=True)
class ManyCampaign(Rounds):
    """All ways on one checkpoint under one limit, in alternating rounds.

    Args:
        shape: name in `SHAPES`.
        limit: bytes of the memory group.
        sequences: how many, one per batch.
        prompt: tokens of each prompt.
        tokens: tokens decoded for each after its prefill.
        reserve: bytes kept free for the states and caches of all sequences when they run together; one at a time has the default.
    """

    shape: str
    limit: int
    sequences: int = 8
    prompt: int = 128
    tokens: int = 4
    reserve: int = 240 << 20
    names: Sequence[str] = WAYS
    ours = WAYS

    @property
    def title(self) -> str:
        """Group name."""
        return f"forward-many[{self.shape}@{self.limit / 2**30:g}GiB x{self.sequences}]"

    def prepare(self) -> None:
        """Make the checkpoint; not timed."""
        checkpoint(self.shape)

    def measure(self, name: str) -> dict[str, Any] | None:
        """One run after a probe of the disk."""
        folder = checkpoint(self.shape)
        files = weight_files(folder)
        drop_cached_pages(files)
        before = raw_read_rate(files)
        command = [sys.executable, "-m", "benchmarks.harness.many", name, str(folder), "--sequences", str(self.sequences)]
        options = ["--reserve", str(self.reserve)] if name == "together" else []
        child = self.child(
            name,
            [*command, "--prompt", str(self.prompt), "--tokens", str(self.tokens), *options],
            limit=None if name == "memory" else self.limit,
            timeout_s=1800,
        )
        if child is None:
            return None
        record = self.keep(name, child, {"raw_bytes_per_s": [before.memory, raw_read_rate(files).memory]})
        self.say(
            f"{self.title} {name:8} decode {1 / _per_token(record):6.3f} tok/s  "
            f"prefill {record['prefill_s']:6.2f} s  all {record['all_s']:6.2f} s  "
            f"peak {(record['peak_bytes'] or 0) / 2**20:5.0f} MiB  read {record['bytes_read'] / 1e9:6.2f} GB  "
            f"raw {before.memory / 1e9:.2f} GB/s"
        )
        return record

    def seconds(self, record: dict[str, Any]) -> float:
        """Of one decoded token of any sequence."""
        return _per_token(record)

    def summary(self) -> dict[str, Any]:
        """Figures of all ways, ratios to `together`, and whether they computed the same tokens."""
        result: dict[str, Any] = {
            **self.head(),
            "model_bytes": SHAPES[self.shape].nbytes(),
            "limit_bytes": self.limit,
            "sequences": self.sequences,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "ways": {way: _figures(records) for way, records in self.runs.items()},
        }
        mine = self.runs.get("together", [])
        others = {way: records for way, records in self.runs.items() if way != "together"}
        if mine and others:
            result["equal_tokens"] = len({str(record["ids"]) for records in self.runs.values() for record in records}) == 1
            for key, seconds in (("decode_ratio", _per_token), ("all_ratio", _everything)):
                own = [seconds(record) for record in mine]
                result[key] = {way: ratio_of_medians([seconds(record) for record in records], own) for way, records in others.items()}
            result["physics"] = self._physics(mine)
        return result

    def _physics(self, mine: list[dict[str, Any]]) -> dict[str, float]:
        rate = max(rate for records in self.runs.values() for record in records for rate in record["raw_bytes_per_s"])
        reading = mine[0]["streamed_bytes"] / rate
        computing = self.sequences * min((_per_token(record) for record in self.runs.get("memory", [])), default=0.0)
        measured = self.sequences * median(_per_token(record) for record in mine)
        return {
            "reading_s": reading,
            "computing_s": computing,
            "measured_s": measured,
            "fraction_of_ideal": max(reading, computing) / measured,
        }


def _per_token(record: dict[str, Any]) -> float:
    return float(median(record["step_s"])) / int(record["tokens_per_step"])


def _everything(record: dict[str, Any]) -> float:
    return float(record["all_s"])


def _figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens_per_s": spread([1 / _per_token(record) for record in records]),
        "prefill_s": spread([record["prefill_s"] for record in records]),
        "all_s": spread([record["all_s"] for record in records]),
        "peak_bytes": max(record["peak_bytes"] or 0 for record in records),
        "bytes_read": max(record["bytes_read"] for record in records),
        "runs": records,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of one measured run; reports JSON to the parent."""
    parser = argparse.ArgumentParser(description="Decode several sequences, together or one after another.")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--reserve", type=int, help="bytes; the default is that of one call")
    given = parser.parse_args(arguments)
    declare_torchvision_operators()
    import torchwrap

    handle = None
    if given.way == "memory":
        model = CONTENDERS["memory"](given.folder, given.folder, {})
    else:
        model = torchwrap.offload.from_pretrained(given.folder, reserve=given.reserve)
        handle = torchwrap.handle_of(model, "offload")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, model.config.vocab_size, (1, given.prompt), generator=generator) for _ in range(given.sequences)]
    many = handle.forward_many if handle is not None and given.way == "together" else None
    started = time.perf_counter()
    groups = [[prompt] for prompt in prompts] if many is None else [prompts]
    runs = [_decode(model, many, group, given.tokens) for group in groups]
    all_s = time.perf_counter() - started
    report(
        {
            "way": given.way,
            "prefill_s": sum(run[0] for run in runs),
            "step_s": [seconds for run in runs for seconds in run[1]],
            "tokens_per_step": len(groups[0]),
            "ids": [ids for run in runs for ids in run[2]],
            "all_s": all_s,
            "bytes_read": 0 if handle is None else handle.stats()["bytes_read"],
            "streamed_bytes": 0 if handle is None else handle.stats()["streamed_bytes"],
        }
    )


@torch.inference_mode()
def _decode(
    model: Any, many: Callable[..., Any] | None, prompts: list[torch.Tensor], tokens: int
) -> tuple[float, list[float], list[list[int]]]:
    """Seconds of the prefill, seconds of each step, and the ids of each sequence."""
    calls = [{"input_ids": prompt, "use_cache": True, "logits_to_keep": 1} for prompt in prompts]
    chosen: list[list[int]] = [[] for _ in prompts]
    seconds = []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        outputs = many(calls) if many is not None else [model(**call) for call in calls]
        nexts = [output.logits[:, -1].argmax(-1, keepdim=True) for output in outputs]
        seconds.append(time.perf_counter() - began)
        for ids, token in zip(chosen, nexts, strict=True):
            ids.append(int(token))
        calls = [
            {"input_ids": token, "past_key_values": output.past_key_values, "use_cache": True, "logits_to_keep": 1}
            for token, output in zip(nexts, outputs, strict=True)
        ]
    return seconds[0], seconds[1:], chosen


if __name__ == "__main__":
    main()
