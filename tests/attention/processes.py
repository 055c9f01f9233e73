"""Several processes on this machine that do one thing together, each saving what it got: `python tests/attention/processes.py` makes them.

One start of Python serves all processes of a file, which are forks of it, and all its cases: importing costs more than everything that
the cases compute.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.forks import forks
from tests.sharing import made_once

if TYPE_CHECKING:
    import pytest
    from torch import Tensor

ROOT = Path(__file__).parents[2]
Results = dict[int, list[dict[str, Any]]]  # by number of processes: what each got, by case


def together(sizes: Sequence[int], cases: str, factory: pytest.TempPathFactory, *, timeout_s: float = 280.0) -> Results:
    """What the functions return that `cases_of(size)` of the module `cases` names, each called with (rank, size) in each process.

    A case that raises returns its exception. All workers of a test run read what one of them has made.

    Returns:
        by number of processes: a dictionary for each process.
    """
    import torch

    folder = made_once(factory, cases, partial(_made, sizes, cases, timeout_s))
    return {size: [torch.load(folder / f"{size}_{rank}.pt", weights_only=False) for rank in range(size)] for size in sizes}


def _made(sizes: Sequence[int], cases: str, timeout_s: float, folder: Path) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, __file__, cases, str(folder), *map(str, sizes)]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = running.communicate(timeout=timeout_s)
        assert running.returncode == 0, said[-4000:]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)


def of(results: Results, size: int, case: str) -> list[dict[str, Any]]:
    """What the processes of one size got in a case; raises what one of them raised."""
    found = [one[case] for one in results[size]]
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-6, relative to the largest where that is above 1."""
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= 1e-6 * max(1.0, float(expected.detach().abs().max()))


def main() -> None:
    """Import once, then fork the processes of each size."""
    cases, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    if hasattr(cases, "prepare"):  # imports what is imported late
        cases.prepare()
    for size in map(int, sys.argv[3:]):
        forks(size, partial(one, cases, folder, size))


def one(cases: Any, folder: Path, size: int, rank: int) -> None:
    """One of the processes."""
    import torch
    import torch.distributed as dist

    meeting = f"file://{folder}/meeting_of_{size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, case in cases.cases_of(size).items():
        try:
            results[name] = case(rank, size)
        except Exception as error:
            results[name] = error
    torch.save(results, folder / f"{size}_{rank}.pt")


if __name__ == "__main__":
    main()
