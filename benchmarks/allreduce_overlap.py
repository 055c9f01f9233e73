"""Draws docs/pictures/tiled_allreduce.png: an attention layer over two processes, its sum after everything and beside the computing.

`python -m benchmarks.allreduce_overlap docs/pictures/tiled_allreduce.png`

Two processes on one machine have no network to wait for, so one is injected: before each sum a thread sleeps for so many milliseconds per
MiB. What is shown is the order of work of process 0 in the fastest of several runs, not the speed of any network.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchwrap.attention.distributed.tiled import TiledRowParallel
from torchwrap.attention.masks.mask import TileMask

TOKENS, HEADS, KV_HEADS, WIDTH, MODEL, SIZE, RUNS = 2048, 8, 2, 64, 1024, 2, 9
Interval = tuple[int, float, float]  # block, begin, end
Lanes = dict[str, list[Interval]]


class SlowLink:
    """A link of given speed: sums one after the other, on a thread of its own.

    Args:
        ms_per_mib: injected delay.
    """

    def __init__(self, ms_per_mib: float) -> None:
        self.ms_per_mib = ms_per_mib
        self.sums: list[Interval] = []
        self.computed: list[float] = []
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def start(self, part: torch.Tensor, group: Any) -> Any:
        """As `torch.distributed.all_reduce(part, async_op=True)`."""
        done = _Done()
        self._queue.put((len(self.computed), part, group, done))
        self.computed.append(time.perf_counter())
        return done

    def _work(self) -> None:
        while True:
            block, part, group, done = self._queue.get()
            begin = time.perf_counter()
            time.sleep(part.nbytes / 2**20 * self.ms_per_mib / 1000)
            dist.all_reduce(part, group=group)
            self.sums.append((block, begin, time.perf_counter()))
            done.set()


class _Done(threading.Event):
    def wait(self, timeout: Any = None) -> bool:
        return super().wait(None if timeout is None else timeout.total_seconds())


def run(rank: int, folder: str, ms_per_mib: float, blocks: int) -> None:
    """One process: each order a few times, of which the fastest counts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    make = torch.Generator().manual_seed(rank)
    shapes = ((1, HEADS, TOKENS, WIDTH), (1, KV_HEADS, TOKENS, WIDTH), (1, KV_HEADS, TOKENS, WIDTH), (MODEL, HEADS * WIDTH))
    q, k, v, weight = (torch.randn(shape, generator=make) for shape in shapes)
    found: dict[int, Lanes] = {}
    outputs = []
    for _ in range(RUNS):
        for count in (1, blocks):
            link = SlowLink(ms_per_mib)
            layer = TiledRowParallel(weight, blocks=count, start=link.start)
            dist.barrier()
            begin = time.perf_counter()
            with torch.no_grad():
                outputs.append(layer(q, k, v, mask=TileMask.causal(1, TOKENS, TOKENS)))
            edges = [begin, *link.computed]
            lanes = {
                "compute": [(block, edges[block] - begin, end - begin) for block, end in enumerate(link.computed)],
                "sum": [(block, start - begin, end - begin) for block, start, end in link.sums],
            }
            if count not in found or seconds(lanes) < seconds(found[count]):
                found[count] = lanes
    assert torch.allclose(outputs[0], outputs[-1], atol=1e-4)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def seconds(lanes: Lanes) -> float:
    """Until the last sum is complete."""
    return max(end for _, _, end in lanes["sum"])


def draw(found: dict[int, Lanes], ms_per_mib: float, path: Path) -> None:
    """Two time lines under each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = ("#3b7dd8", "#2a9d62", "#f2a33a", "#d8503b", "#8b5fbf", "#5aa9b8")
    figure = Figure(figsize=(12, 4.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(found), 1, sharex=True)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.8, bottom=0.12, hspace=0.5)
    for axes, (count, lanes) in zip(plots, found.items(), strict=True):
        for height, lane in enumerate(("sum", "compute")):
            for block, begin, end in lanes[lane]:
                axes.barh(height, (end - begin) * 1e3, left=begin * 1e3, height=0.62, color=colors[block % len(colors)], edgecolor="white")
                axes.text((begin + end) * 500, height, str(block), ha="center", va="center", color="white", fontsize=9)
        last = seconds(lanes) * 1e3
        axes.axvline(last, color="#20262e", lw=1, ls=(0, (4, 3)))
        axes.set_yticks([0, 1], ["all-reduce", "compute"])
        axes.set_title(f"{count} block{'s' if count > 1 else ''}: complete after {last:.0f} ms", loc="left", fontsize=10.5)
        axes.spines[["top", "right"]].set_visible(False)
    plots[-1].set_xlabel("milliseconds, process 0 of 2")
    title = "Attention and output projection over two processes, all-reduced in blocks of equal work"
    said = f"gloo on one machine, injected link delay of {ms_per_mib:g} ms per MiB; numbers are blocks of rows; fastest of {RUNS} runs"
    figure.text(0.09, 0.93, title, fontsize=13, fontweight="bold")
    figure.text(0.09, 0.875, said, fontsize=10, color="#6b7280")
    figure.savefig(path, pil_kwargs={"optimize": True})


def main() -> None:
    """Run two processes and draw what process 0 did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--ms-per-mib", type=float, default=25.0)
    parser.add_argument("--blocks", type=int, default=6)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder, asked.ms_per_mib, asked.blocks), nprocs=SIZE)
        found = torch.load(Path(folder) / "found.pt")
    draw(found, asked.ms_per_mib, asked.picture)
    for count, lanes in found.items():
        print(f"{count} blocks: {seconds(lanes) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
