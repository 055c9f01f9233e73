"""Where results go and how they are judged: one JSON file per machine and day, bars from targets.toml.

A bar never stops a run: figures are stored whatever they are, and the verdicts beside them say which bars they clear.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "TARGETS", "judge", "machine", "verdict_lines", "write_results"]

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ROOT / "benchmarks" / "targets.toml"
RESULTS = ROOT / "docs" / "results"


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, memory, kernel, versions."""
    info: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions("torch", "transformers", "accelerate", "airllm", "diffusers", "safetensors", "torchwrap"),
    }
    if torch.cuda.is_available():
        info["device"] = torch.cuda.get_device_name()
    return info


def judge(title: str, summary: Mapping[str, Any], *, targets: Path = TARGETS) -> list[dict[str, Any]]:
    """Compare a summary with the bars for `title`; a figure that is missing fails its bar."""
    verdicts = []
    for bar in _load_toml(targets).get("bar", []):
        if bar["run"] != title:
            continue
        value = _lookup(summary, bar["metric"])
        verdicts.append({**bar, "value": value, "met": _met(bar, value)})
    return verdicts


def verdict_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One printable line per bar."""
    return [
        f"{_verdict(verdict)} {verdict['run']} {verdict['metric']} = {_show(verdict['value'])} (bar {_bar(verdict)})"
        for verdict in verdicts
    ]


def write_results(runs: Mapping[str, Mapping[str, Any]], *, folder: Path = RESULTS, day: datetime.date | None = None) -> Path:
    """Add `runs` (title -> summary) to `<machine>-<date>.json`, replacing runs of the same title."""
    info = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{info['cores']}-cores {info.get('device') or info['processor']}".lower()).strip("-")
    target = folder / f"{slug}-{(day or datetime.date.today()).isoformat()}.json"
    stored = json.loads(target.read_text()) if target.exists() else {"runs": {}}
    stored.update(machine=info, command=" ".join(["python", "-m", "benchmarks", *sys.argv[1:]]))
    for title, summary in runs.items():
        stored["runs"][title] = {**summary, "verdicts": judge(title, summary)}
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(stored, indent=1) + "\n")
    partial.replace(target)
    return target


def _met(bar: Mapping[str, Any], value: Any) -> bool:
    if value is None:
        return False
    if "equals" in bar:
        return bool(value == bar["equals"])
    return bool(bar.get("at_least", float("-inf")) <= value <= bar.get("at_most", float("inf")))


def _lookup(summary: Mapping[str, Any], path: str) -> Any:
    value: Any = summary
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _verdict(verdict: Mapping[str, Any]) -> str:
    if verdict["value"] is None:
        return "absent"
    return "met   " if verdict["met"] else "MISSED"


def _bar(verdict: Mapping[str, Any]) -> str:
    signs = {"equals": "=", "at_least": ">=", "at_most": "<="}
    return ", ".join(f"{sign} {_show(verdict[key])}" for key, sign in signs.items() if key in verdict)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _load_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        # Python 3.10 has no TOML reader; pytest brings this one there.
        import tomli as tomllib
    with path.open("rb") as file:
        return tomllib.load(file)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
