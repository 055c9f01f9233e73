"""What was measured on this machine, in memory and in one file for each device and set of versions.

A file is named by a hash of what its figures hold for: device, capability, versions of torch, triton, CUDA and this library. It is replaced
as a whole, with what another process has added since. A file that is damaged, or holds for another machine, is left aside with a warning
and written anew with the next figure. Nothing in it is run; at worst a wrong file makes calls slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchwrap.attention.tuning.kinds import Kind
from torchwrap.core.errors import ConfigError, StorageError, TorchwrapWarning
from torchwrap.storage.atomic import atomic_write, private_folder

__all__ = ["MARGIN", "Measurements", "machine_of", "measurements", "ranked"]

FORMAT = 1
MARGIN = 0.97
"""A back end displaces torch's own if it needs at most this share of its time: less is within the noise of a measurement."""


class Measurements:
    """Seconds of back ends by kinds of calls.

    Args:
        folder: where the file is; made when something is written.
        machine: what the figures hold for.

    Attributes:
        path: the file.
        orders: names of back ends, fastest first, by kind; empty where fewer than two could be compared.
        reasons: why a back end is where it is in the order, by kind and name.
        lists: what the dispatcher has made of both, by kind; dropped with every new figure.
    """

    def __init__(self, folder: Path, machine: Mapping[str, str]) -> None:
        self.machine = dict(machine)
        self.path: Path = folder / f"{hashlib.sha256(_canonical(self.machine)).hexdigest()[:24]}.json"
        self.orders: dict[Kind, tuple[str, ...]] = {}
        self.reasons: dict[tuple[Kind, str], str] = {}
        self.lists: dict[Kind, tuple[tuple[str, ...], dict[str, str]]] = {}
        self._seconds: dict[Kind, dict[str, float]] = {}
        self._lock = threading.Lock()
        self._left_aside = ""  # why the file was, when that was last said
        self._take(self._read())

    def add(self, kind: Kind, seconds: Mapping[str, float]) -> None:
        """Figures of one kind of calls, beside those of other back ends; written to the file unless there was nothing to compare.

        Args:
            kind: of the calls.
            seconds: of each back end that could run them.
        """
        with self._lock:
            self._take({kind: self._seconds.get(kind, {}) | dict(seconds)})
            if len(seconds) > 1:
                self._take(self._read() | self._seconds)
                self._write()

    def seconds(self) -> dict[Kind, dict[str, float]]:
        """All figures."""
        with self._lock:
            return {kind: dict(found) for kind, found in self._seconds.items()}

    def _take(self, figures: Mapping[Kind, dict[str, float]]) -> None:
        for kind, seconds in figures.items():
            self._seconds[kind] = seconds
            order = ranked(seconds)
            for name in order:
                others = ", ".join(f"{other} {_duration(seconds[other])}" for other in order if other != name)
                self.reasons[kind, name] = f"measured here: {_duration(seconds[name])}" + (f", {others}" if others else "")
            self.orders[kind] = order if len(order) > 1 else ()
        self.lists = {}

    def _read(self) -> dict[Kind, dict[str, float]]:
        try:
            content = self.path.read_bytes()
        except OSError:
            return {}
        try:
            return _figures(json.loads(content), self.machine)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if self._left_aside != (why := str(error)):
                self._left_aside = why
                warnings.warn(
                    f"{self.path} is left aside and written anew when something is measured: {why}. Delete it, if that is not wanted.",
                    TorchwrapWarning,
                    stacklevel=2,
                )
            return {}

    def _write(self) -> None:
        kinds = [[list(kind), seconds] for kind, seconds in self._seconds.items() if len(seconds) > 1]
        said: dict[str, Any] = {"format": FORMAT, "machine": self.machine, "kinds": kinds}
        said["sha256"] = hashlib.sha256(_canonical(said)).hexdigest()
        try:
            private_folder(self.path.parent)
            atomic_write(self.path, json.dumps(said, indent=1).encode())
        except StorageError as error:
            warnings.warn(f"figures of attention are not kept for the next process: {error}", TorchwrapWarning, stacklevel=2)


def ranked(seconds: Mapping[str, float]) -> tuple[str, ...]:
    """Names by time, fastest first; torch's fastest before one that is faster by less than `MARGIN`."""
    order = sorted(seconds, key=lambda name: seconds[name])
    own = next((name for name in order if name.startswith("sdpa")), None)
    if own is not None and seconds[order[0]] > MARGIN * seconds[own]:
        order.remove(own)
        order.insert(0, own)
    return tuple(order)


_kept: dict[tuple[torch.device, str | None], Measurements] = {}
_lock = threading.Lock()


def measurements(device: torch.device, folder: str | None) -> Measurements:
    """What was measured on a device; read from the file once for each process and folder.

    Args:
        device: with its index, if it has one.
        folder: None: `$TORCHWRAP_CACHE`, else `~/.cache/torchwrap`, folder `attention`.

    Raises:
        ConfigError: the folder's name cannot be one.
    """
    found = _kept.get((device, folder))
    if found is None:
        with _lock:  # two of them would not know of each other's figures
            if (device, folder) not in _kept:
                _kept[device, folder] = Measurements(_place(folder), machine_of(device))
            found = _kept[device, folder]
    return found


def _place(folder: str | None) -> Path:
    if folder is None:
        return Path(os.environ.get("TORCHWRAP_CACHE") or Path.home() / ".cache" / "torchwrap") / "attention"
    try:
        os.fsencode(folder)
        if "\0" in folder:
            raise ValueError("embedded null byte")
        return Path(folder).expanduser()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"tune_dir={folder!r} names no folder: {error}", where="tune_dir", fix="Give a folder, or None.") from error


def machine_of(device: torch.device) -> dict[str, str]:
    """What figures taken on a device hold for."""
    found = {"torch": torch.__version__, "torchwrap": _version("torchwrap")}
    if device.type != "cuda":
        return found | {"device": device.type, "processor": _processor(), "cores": str(os.cpu_count())}
    properties = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")
    return found | {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}", "triton": _version("triton"),
        "cuda": str(torch.version.cuda), "driver": str(driver()), "flash_attn": _version("flash_attn"),
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _figures(said: Any, machine: Mapping[str, str]) -> dict[Kind, dict[str, float]]:
    """Figures of a file's content.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: it is not what `_write` wrote here.
    """
    if not isinstance(said, dict):
        raise ValueError("it holds no table")
    digest = said.pop("sha256")
    if said["format"] != FORMAT:
        raise ValueError(f"its format is {said['format']!r}, and {FORMAT} is read here")
    if digest != hashlib.sha256(_canonical(said)).hexdigest():
        raise ValueError("it was changed after it was written")
    if said["machine"] != machine:
        raise ValueError(f"it holds for {said['machine']}, and this is {dict(machine)}")
    found = {}
    for kind, seconds in said["kinds"]:
        if not all(isinstance(name, str) and math.isfinite(value) and value > 0 for name, value in seconds.items()):
            raise ValueError(f"{seconds!r} are no times")
        found[tuple(kind)] = {name: float(value) for name, value in seconds.items()}
    return found


def _canonical(said: Any) -> bytes:
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
