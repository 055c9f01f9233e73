"""What this machine offers: versions, devices, memory and its limit, disk and copy speeds, compiled kernels, and which integrations load.

The disk speed is measured, not looked up: a temporary file is written into --path and read back past the page cache with the same reader
that `offload` uses. The other figures come from the kernel. Exit status 1 when something will make `offload` slow or impossible.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torchwrap.cli.output import Outcome, existing_folder, size, table

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "what this machine offers: versions, memory, disk and copy speeds, integrations"

_PACKAGES = ("torchwrap", "torch", "numpy", "safetensors", "transformers", "accelerate", "torchvision", "timm", "peft")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--path", type=existing_folder, default=None, help="folder whose disk to measure (default: the temporary folder)")
    parser.add_argument("--bytes", type=size, default=256 << 20, metavar="SIZE", help="size of the file to read (default: 256MiB)")
    parser.add_argument("--no-measure", action="store_true", help="skip the measurements")


def run(arguments: argparse.Namespace) -> Outcome:
    """Examine, measure, and list what would hurt."""
    folder = arguments.path or Path(tempfile.gettempdir())
    data: dict[str, object] = {
        "versions": _versions(),
        "machine": _machine(),
        "memory": _memory(),
        "disk": _disk(folder, arguments.bytes, measure=not arguments.no_measure),
        "copies": {} if arguments.no_measure else _copies(),
        "native": _native(),
        "integrations": _integrations(),
    }
    problems = _problems(data)
    data["problems"] = problems
    return Outcome(data=data, text=_text(data, problems), ok=not problems)


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _machine() -> dict[str, object]:
    import torch

    devices = [
        {"name": properties.name, "bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(), "cpu": _cpu_model(), "cores": cores, "torch_threads": torch.get_num_threads(), "cuda": devices}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> dict[str, int | str | None]:
    from torchwrap.storage.heap import refusal
    from torchwrap.storage.limits import memory_available, memory_limit, memory_usage

    return {"limit": memory_limit(), "used": memory_usage(), "available": memory_available(), "reuse_refused": refusal()}


def _disk(folder: Path, nbytes: int, *, measure: bool) -> dict[str, object]:
    free = shutil.disk_usage(folder).free
    found: dict[str, object] = {"path": str(folder), "free": free, "io_uring": _io_uring()}
    if not measure:
        return found
    import torch

    from torchwrap.storage.aio import probe
    from torchwrap.storage.spill import SpillStore

    store = SpillStore.create(folder, needed=nbytes)
    try:
        # Random bytes: some disks and file systems compress or skip zeros, which would flatter the figure.
        content = torch.randint(0, 256, (max(nbytes, 1),), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        started = time.perf_counter()
        store.put("probe", content)
        found["write_bytes_per_s"] = nbytes / (time.perf_counter() - started)
        measured = probe(store.file, seconds=0.5)
        found |= {
            "read_bytes_per_s": measured.bytes_per_s,
            "read_threads": measured.threads,
            "read_chunk": measured.chunk,
            "direct": measured.direct,
        }
    finally:
        store.close()
    return found


def _io_uring() -> str:
    """Whether io_backend="uring" can be had: a ring is made, read through, and given back."""
    from torchwrap.storage.uring import unavailable_reason

    reason = unavailable_reason()
    return "yes" if reason is None else f"no ({reason})"


def _copies() -> dict[str, float]:
    import torch

    nbytes = 256 << 20
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    found = {"host_bytes_per_s": nbytes / _best(lambda: target.copy_(source))}
    if torch.cuda.is_available():
        pinned, device = source.pin_memory(), torch.empty(nbytes, dtype=torch.uint8, device="cuda")

        def copy(into: torch.Tensor, out_of: torch.Tensor) -> None:
            into.copy_(out_of, non_blocking=True)
            torch.cuda.synchronize()

        found["host_to_device_bytes_per_s"] = nbytes / _best(lambda: copy(device, pinned))
        found["device_to_host_bytes_per_s"] = nbytes / _best(lambda: copy(pinned, device))
    return found


def _best(action: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _native() -> dict[str, object]:
    from torchwrap.native import describe

    return describe()


def _integrations() -> list[dict[str, object]]:
    import importlib
    from importlib.metadata import PackageNotFoundError, entry_points, version

    found = []
    for point in sorted(entry_points(group="torchwrap.integrations"), key=lambda point: point.name):
        row: dict[str, object] = {"name": point.name, "loads": True, "reason": ""}
        try:
            integration = point.load()
            installed = {name: version(name) for name in integration.tested}
            for name in integration.tested:
                importlib.import_module(name)  # an integration imports its framework late; a broken pair of packages shows here
            row |= {"tested": {name: list(bounds) for name, bounds in integration.tested.items()}, "installed": installed}
        except PackageNotFoundError as error:
            row |= {"loads": False, "reason": f"{error.name} is not installed"}
        except Exception as error:  # whatever a third party's package raises while it is imported is the answer to "why not"
            row |= {"loads": False, "reason": f"{type(error).__name__}: {error}"}
        found.append(row)
    return found


def _problems(data: dict[str, object]) -> list[str]:
    problems = []
    disk = data["disk"]
    assert isinstance(disk, dict)
    if disk.get("direct") is False:
        problems.append(
            f"{disk['path']} refuses O_DIRECT (tmpfs, overlay or network): reads go through the page cache; choose another --path"
        )
    if disk["free"] < 1 << 30:
        problems.append(
            f"{disk['path']} has less than 1 GiB free: a model in memory cannot be spilled there; free space or choose another --path"
        )
    return problems


def _text(data: dict[str, object], problems: list[str]) -> str:
    from torchwrap.core.config import format_bytes

    versions, machine, memory, disk, copies, native, integrations = (
        data[key] for key in ("versions", "machine", "memory", "disk", "copies", "native", "integrations")
    )
    assert isinstance(versions, dict) and isinstance(machine, dict) and isinstance(memory, dict)
    assert isinstance(disk, dict) and isinstance(copies, dict) and isinstance(native, dict) and isinstance(integrations, list)

    def amount(value: object) -> str:
        return format_bytes(int(value)) if isinstance(value, (int, float)) else "unknown"

    rows: list[tuple[object, ...]] = [("versions", ", ".join(f"{name} {found}" for name, found in versions.items() if found))]
    missing = ", ".join(name for name, found in versions.items() if not found)
    if missing:
        rows.append(("not installed", missing))
    rows.append(("cpu", f"{machine['cpu']}, {machine['cores']} cores, torch uses {machine['torch_threads']} threads"))
    rows += [("cuda", f"{card['name']}, {amount(card['bytes'])}, compute {card['capability']}") for card in machine["cuda"]] or [
        ("cuda", "none")
    ]
    limit = amount(memory["limit"]) if memory["limit"] else "none"
    rows.append(("memory", f"{amount(memory['available'])} available, cgroup limit {limit}"))
    refused = memory["reuse_refused"]
    rows.append(("", f"of tensors freed in training: {f'not used again: {refused}' if refused else 'used again'}"))
    rows.append(("disk", f"{disk['path']}: {amount(disk['free'])} free, io_uring {disk['io_uring']}"))
    if "read_bytes_per_s" in disk:
        how = f"{'O_DIRECT' if disk['direct'] else 'buffered'}, {disk['read_threads']} threads of {amount(disk['read_chunk'])}"
        rows.append(("", f"reads {amount(disk['read_bytes_per_s'])}/s ({how})"))
        rows.append(("", f"writes {amount(disk['write_bytes_per_s'])}/s with checksums"))
    rows += [("copy", f"{name.removesuffix('_bytes_per_s').replace('_', ' ')}: {amount(value)}/s") for name, value in copies.items()]
    compiled = "no ({reason})" if "reason" in native else "{instruction_set}, {compiler}, threads of {threads}"
    rows.append(("native", compiled.format(**native)))
    for found in integrations:
        said = f"not loaded, {found['reason']}"
        if found["loads"]:
            said = "; ".join(f"{name} {found['installed'][name]} (tested {low} to {high})" for name, (low, high) in found["tested"].items())
        rows.append(("integration", f"{found['name']}: {said}"))
    rows += [("problem", text) for text in problems] or [("problems", "none")]
    return table(rows)
