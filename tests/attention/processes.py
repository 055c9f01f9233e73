"""Several processes on this machine that do one thing together, each saving what it got: `python tests/attention/processes.py` in each.

One start of Python for each process serves all cases of a file, because starting costs more than everything the cases compute.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def together(size: int, cases: str, folder: Path, *, timeout_s: float = 120.0) -> list[dict[str, Any]]:
    """What the functions return that `cases_of(size)` of the module `cases` names, each called with (rank, size) in each process.

    A case that raises returns its exception.
    """
    import torch

    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size), cases, str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def main() -> None:
    """One of the processes."""
    rank, size, cases, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, case in importlib.import_module(cases).cases_of(size).items():
        try:
            results[name] = case(rank, size)
        except Exception as error:
            results[name] = error
    torch.save(results, folder / f"{rank}.pt")
    # The last case may have broken the group on purpose, and taking it down would wait for the others.
    os._exit(0)


if __name__ == "__main__":
    main()
