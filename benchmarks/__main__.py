"""`python -m benchmarks`: run the offload benchmarks, judge them, write docs/results/<machine>-<date>.json.

python -m benchmarks                          everything `make bench` runs
python -m benchmarks offload-limit --shape llama-2.7GB --limit 1GiB --rounds 3
python -m benchmarks offload-limit --only torchwrap mmap --rounds 1 --no-write
python -m benchmarks offload-fits
python -m benchmarks forward-many             eight sequences through one model, together and one after another
python -m benchmarks training                 training with weights and optimizer state on the disk
python -m benchmarks training-faults          twenty runs of training, each killed at a random moment; not part of "all"
python -m benchmarks superpipeline            peak, time and transfers over (k, k') on a virtual clock; prints the table of the docs
python -m benchmarks superpipeline-prefill    a prompt through 0.4 n of the blocks, in real time
python -m benchmarks attention                attention on the CPU: every shape against torch and transformers
python -m benchmarks attention-short          attention of a few tokens at random shapes: how often torch is faster
python -m benchmarks attention-model          tokens per second and memory of SmolLM2: eager, sdpa, ours
python -m benchmarks attention-batching       tokens per second of SmolLM2 under transformers' continuous batching
python -m benchmarks --check                  exit status 1 when a bar of targets.toml is missed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.campaign import ALL, Campaign, available
from benchmarks.harness.cgroup import unavailable_reason
from benchmarks.harness.contenders import declare_torchvision_operators
from benchmarks.harness.many import ManyCampaign
from benchmarks.harness.results import RESULTS, judge, verdict_lines, write_results
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.training import CONTENDERS, TrainingCampaign

GIB = 1 << 30
_WHAT = (
    "all", "offload-limit", "offload-fits", "training", "training-faults", "forward-many", "superpipeline", "superpipeline-prefill",
    "attention",
    "attention-short",
    "attention-model",
    "attention-batching",
)  # fmt: skip
_SHOWN = (
    "equal_tokens",
    "equal_logits",
    "equal_losses",
    "losses",
    "loss_distance",
    "decode_ratio",
    "prefill_ratio",
    "all_ratio",
    "step_ratio",
    "slowdown_over_memory",
    "prediction",
    "physics",
    "dropped",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=_WHAT)
    parser.add_argument("--shape", nargs="+", default=["llama-2.7GB", "llama-thin-tied"])
    parser.add_argument("--limit", type=_size, default=GIB, help="memory limit, as 1GiB or 700MiB")
    parser.add_argument("--only", nargs="+", choices=sorted({*ALL, *CONTENDERS}), help="these contenders instead of all installed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--kills", type=int, default=20, help="of training-faults")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="where superpipeline draws peak and time over (k, k')")
    parser.add_argument("--rows", help="attention: only rows whose name contains this")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a bar is missed")
    given = parser.parse_args(arguments)
    runs: dict[str, dict[str, Any]] = {}
    if given.what in ("all", "offload-limit"):
        reason = unavailable_reason()
        if reason:
            print(f"offload-limit skipped: {reason}")
        else:
            for campaign in _campaigns(given):
                runs[campaign.title] = _complete(campaign, given.rounds)
    if given.what in ("all", "offload-fits"):
        declare_torchvision_operators()
        from benchmarks.harness.fits import TITLE, measure_fits

        runs[TITLE] = measure_fits()
        print(TITLE, {name: {phase: round(ratio, 3) for phase, ratio in speeds.items()} for name, speeds in runs[TITLE]["speed"].items()})
    if given.what in ("all", "training"):
        reason = unavailable_reason()
        if reason:
            print(f"training skipped: {reason}")
        else:
            training = TrainingCampaign(names=[name for name in given.only or CONTENDERS if name in CONTENDERS])
            runs[training.title] = _complete(training, given.rounds)
    if given.what == "training-faults":
        declare_torchvision_operators()
        from benchmarks.harness.kills import TITLE as KILLS
        from benchmarks.harness.kills import measure_kills

        runs[KILLS] = measure_kills(given.kills)
    if given.what in ("all", "forward-many"):
        reason = unavailable_reason()
        if reason:
            print(f"forward-many skipped: {reason}")
        else:
            many = ManyCampaign(shape="llama-2.7GB", limit=given.limit)
            runs[many.title] = _complete(many, given.rounds)
    if given.what in ("all", "superpipeline"):
        from benchmarks.harness import window

        runs[window.TITLE] = window.measure_window()
        print(window.table(runs[window.TITLE]))
    if given.what in ("all", "superpipeline-prefill"):
        declare_torchvision_operators()
        from benchmarks.harness.prefill import measure_prefill

        prefill = measure_prefill(rounds=given.rounds)
        runs[prefill["title"]] = prefill
    if given.what == "attention":
        from benchmarks import attention

        runs[attention.TITLE] = attention.measure_attention(rounds=max(given.rounds, 5), only=given.rows)
        print(attention.table(runs[attention.TITLE]))
    if given.what == "attention-short":
        from benchmarks import short_attention

        runs[short_attention.TITLE] = short_attention.measure_short()
        print(short_attention.table(runs[short_attention.TITLE]))
    if given.what == "attention-model":
        from benchmarks import model_attention

        runs[model_attention.TITLE] = model_attention.measure_model(rounds=max(given.rounds, 5))
        for key in ("tokens_per_s", "decode_ratio", "prefill_ratio", "equal_tokens", "memory"):
            print(f"{model_attention.TITLE} {key}: {_rounded(runs[model_attention.TITLE].get(key))}")
    if given.what == "attention-batching":
        from benchmarks import continuous_batching

        runs[continuous_batching.TITLE] = continuous_batching.measure_batching(rounds=given.rounds)
        for key in ("tokens_per_s", "ratio", "first_s", "first_ratio", "equal_tokens"):
            print(f"{continuous_batching.TITLE} {key}: {_rounded(runs[continuous_batching.TITLE].get(key))}")
    verdicts = [verdict for title, summary in runs.items() for verdict in judge(title, summary)]
    print(*verdict_lines(verdicts), sep="\n")
    if runs and not given.no_write:
        print(f"written: {write_results(runs, folder=given.results)}")
    if given.picture is not None and given.what in ("all", "superpipeline"):
        given.picture.write_bytes(window.picture(runs[window.TITLE]))
    return int(given.check and not all(verdict["met"] for verdict in verdicts))


def _campaigns(given: argparse.Namespace) -> list[Campaign]:
    names = available(name for name in given.only or ALL if name in ALL)
    found = [Campaign(shape=shape, limit=given.limit, names=names, tokens=given.tokens) for shape in given.shape]
    if given.what == "all":
        # More memory, same model: only the law (streamed bytes / bandwidth) is at stake, so no rivals but the compute floor.
        found += [Campaign(shape="llama-2.7GB", limit=GIB * 3 // 2, names=("torchwrap", "memory"), tokens=given.tokens)]
    return found


def _complete(campaign: Rounds, rounds: int) -> dict[str, Any]:
    campaign.prepare()
    for index in range(rounds):
        campaign.round(index)
    summary = campaign.summary()
    for key in _SHOWN:
        if key in summary:
            print(f"{campaign.title} {key}: {_rounded(summary[key])}")
    return summary


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _size(text: str) -> int:
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
