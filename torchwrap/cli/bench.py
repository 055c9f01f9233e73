"""Times a model folder under torchwrap against other ways to run it, fairly.

Every contender runs in a fresh process that starts from a cold page cache; rounds are interleaved and the order rotates, so that a disk
that slows down slows everybody down. Reported are medians with their interquartile range, the ratio to each rival, and whether all
contenders chose the same tokens. Logits are compared bit for bit, too; a rival that copies weights to addresses of another alignment may
differ in the last bits, because processor kernels start a row elsewhere. Exit status 1 when tokens differ or a contender failed.

rivals: mmap        plain from_pretrained: the kernel pages the mapped safetensors files in and out
        accelerate  accelerate's disk_offload
        memory      everything in memory, the floor of the computation

example: torchwrap bench ./my-model --limit 1GiB --device-memory 600MiB
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypedDict

from torchwrap.cli.output import Outcome, existing_folder, positive, size, table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["SUMMARY", "Compared", "configure", "run"]

SUMMARY = "speed and equality against accelerate, memory mapping and the model in memory"


class Compared(TypedDict):
    """Logits of two contenders: equal in all bits, and how far the winning ones are apart at most."""

    equal: bool
    largest_difference: float


_TECHNIQUES = ("offload",)
_RIVALS = ("accelerate", "mmap", "memory")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", type=existing_folder, help="folder of a causal language model with safetensors files")
    parser.add_argument(
        "--with", dest="techniques", type=_names(_TECHNIQUES), default=["offload"], metavar="NAMES", help="default: offload"
    )
    parser.add_argument("--against", type=_names(_RIVALS), default=["accelerate", "mmap"], metavar="NAMES", help="default: accelerate,mmap")
    parser.add_argument("--limit", type=size, metavar="SIZE", help="memory limit of every contender (control group, needs root)")
    parser.add_argument(
        "--device-memory", type=size, metavar="SIZE", help="budget of offload (default: what the machine or the limit leaves)"
    )
    parser.add_argument("--host-memory", type=size, metavar="SIZE", help="host budget of offload beside a separate device")
    parser.add_argument("--rounds", type=positive, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of the prompt (default: 128)")
    parser.add_argument("--tokens", type=positive, default=6, help="tokens to decode (default: 6)")
    parser.add_argument("--path", type=existing_folder, help="folder for files that a contender writes (default: the temporary folder)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="limit of one run (default: 600)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run all rounds, then compare."""
    names = [*arguments.techniques, *arguments.against]
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in names}
    for round_number in range(arguments.rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            print(f"round {round_number + 1} of {arguments.rounds}: {name}", file=sys.stderr)
            runs[name].append(_run_once(name, arguments))
    failures = {name: str(one["error"]) for name, found in runs.items() for one in found if "error" in one}
    rows = {name: _summary(found) for name, found in runs.items() if name not in failures}
    same_ids = len({json.dumps(one["ids"]) for name in rows for one in runs[name]}) == 1
    logits = {
        f"{rival}/{ours}": _compare(runs[rival], runs[ours])
        for ours in arguments.techniques
        for rival in arguments.against
        if {ours, rival} <= rows.keys()
    }
    ratios = {
        f"{rival}/{ours}": rows[rival]["decode_s"] / rows[ours]["decode_s"]
        for ours in arguments.techniques
        for rival in arguments.against
        if ours in rows and rival in rows
    }
    data: dict[str, object] = {
        "model": str(arguments.model),
        "limit": arguments.limit,
        "rounds": arguments.rounds,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "contenders": rows,
        "ratios": ratios,
        "same_tokens": same_ids,
        "logits": logits,
        "failures": failures,
        "runs": runs,
    }
    return Outcome(data=data, text=_text(rows, ratios, failures, same_ids, logits), ok=same_ids and not failures)


def _run_once(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    from torchwrap.cli.limit import memory_group

    budget = {key: getattr(arguments, key) for key in ("device_memory", "host_memory") if getattr(arguments, key) is not None}
    options = {
        "name": name,
        "folder": str(arguments.model),
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "path": _text_of(arguments.path),
        "budget": budget,
    }
    command = [sys.executable, "-m", "torchwrap.cli.contender", json.dumps(options)]
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(arguments.limit)) if arguments.limit else None
        try:
            done = subprocess.run(
                group.command(command) if group else command, capture_output=True, text=True, timeout=arguments.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {arguments.timeout:.0f} s"}
        if done.returncode != 0:
            return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-2000:] or 'no message (stopped for memory?)'}"}
        result: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
        result["group_peak_bytes"] = group.peak() if group else None
        return result


def _compare(one: list[dict[str, object]], other: list[dict[str, object]]) -> Compared:
    pairs = list(zip(_numbers(one[0]["best_logits"]), _numbers(other[0]["best_logits"]), strict=True))
    digests = {found["logits_sha256"] for found in (*one, *other)}
    return {"equal": len(digests) == 1, "largest_difference": max(abs(first - second) for first, second in pairs)}


def _text_of(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _summary(found: list[dict[str, object]]) -> dict[str, float]:
    """Each run gives one figure, the median of its tokens; the runs give the median and the spread."""
    decode = [statistics.median(_numbers(one["decode_s"])) for one in found]
    low, high = (decode[0], decode[0]) if len(decode) < 2 else statistics.quantiles(decode, n=4, method="inclusive")[::2]
    peaks = [one["group_peak_bytes"] or one["hwm_bytes"] or 0 for one in found]
    return {
        "decode_s": statistics.median(decode),
        "decode_iqr_s": high - low,
        "tokens_per_s": 1 / statistics.median(decode),
        "prefill_s": statistics.median(_number(one["prefill_s"]) for one in found),
        "load_s": statistics.median(_number(one["load_s"]) for one in found),
        "peak_bytes": max(_number(peak) for peak in peaks),
    }


def _numbers(value: object) -> list[float]:
    assert isinstance(value, list)
    return value


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)


def _text(
    rows: dict[str, dict[str, float]], ratios: dict[str, float], failures: dict[str, str], same_ids: bool, logits: dict[str, Compared]
) -> str:
    from torchwrap.core.config import format_bytes

    cells = [
        (
            name,
            f"{row['decode_s']:.3f}",
            f"{row['decode_iqr_s']:.3f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['prefill_s']:.2f}",
            f"{row['load_s']:.2f}",
            format_bytes(int(row["peak_bytes"])),
        )
        for name, row in rows.items()
    ]
    lines = [table(cells, ("contender", "s/token", "IQR", "tok/s", "prefill s", "load s", "peak memory")), ""]
    for pair, ratio in ratios.items():
        rival, ours = pair.split("/")
        same = (
            "logits bit-identical"
            if logits[pair]["equal"]
            else f"winning logits differ by at most {logits[pair]['largest_difference']:.2g}"
        )
        lines.append(f"{ours} is {ratio:.2f} times as fast as {rival}; {same}")
    lines.append(f"tokens equal: {same_ids}")
    lines += [f"failed: {name}: {reason}" for name, reason in failures.items()]
    return "\n".join(lines)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return names

    return parse
