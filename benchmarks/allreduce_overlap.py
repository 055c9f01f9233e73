"""An attention layer over two processes, its sum after everything and beside the computing: times, and docs/pictures/tiled_allreduce.png.

`python -m benchmarks.allreduce_overlap [--picture docs/pictures/tiled_allreduce.png] [--json results.json]`

Two processes on one machine have no network to wait for, so one is injected: before each sum a thread sleeps for so many milliseconds per
MiB. What gloo itself takes comes on top, and takes its processor time from the computing. Each shape is what one process of a larger group
would have; the number of blocks is what the library chooses (`"auto"`) after measuring both. Ratios are of medians of alternating runs.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchwrap.attention.distributed.tiled import TiledRowParallel
from torchwrap.attention.masks.mask import TileMask

SIZE = 2
Interval = tuple[int, float, float]  # block, begin, end
Lanes = dict[str, list[Interval]]


@dataclass(frozen=True)
class Shape:
    """What one process has of a layer: local query and key heads of `width`, of a model `model` wide."""

    said: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    model: int


SHAPES = (
    Shape("1024 wide, 16 heads over 2", 1, 2048, 8, 2, 64, 1024),
    Shape("1024 wide, 16 heads over 8", 1, 2048, 2, 1, 64, 1024),
    Shape("1024 wide, 16 heads over 8", 4, 512, 2, 1, 64, 1024),
    Shape("2048 wide, 32 heads over 8", 1, 1024, 4, 1, 64, 2048),
    Shape("4096 wide, 32 heads over 16", 1, 512, 2, 1, 128, 4096),
)
DRAWN = 2
FIXED = 6


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

    def lanes(self, begin: float) -> Lanes:
        """What was computed and what was summed since `begin`, in seconds from there; forgets it."""
        edges = [begin, *self.computed]
        found = {
            "compute": [(block, edges[block] - begin, end - begin) for block, end in enumerate(self.computed)],
            "sum": [(block, start - begin, end - begin) for block, start, end in self.sums],
        }
        self.forget()
        return found

    def forget(self) -> None:
        """Begin anew."""
        self.sums, self.computed = [], []

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


def run(rank: int, folder: str, ms_per_mib: float, rounds: int) -> None:
    """One process: both orders of every shape, alternating."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    found = [measured(shape, rank, SlowLink(ms_per_mib), rounds) for shape in SHAPES]
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def measured(shape: Shape, rank: int, link: SlowLink, rounds: int) -> dict[str, Any]:
    """Times and lanes of one shape."""
    make = torch.Generator().manual_seed(rank)
    batch, tokens, width = shape.batch, shape.tokens, shape.width
    sizes = ((batch, shape.heads, tokens, width), *((batch, shape.kv_heads, tokens, width),) * 2)
    q, k, v = (torch.randn(size, generator=make) for size in sizes)
    weight = torch.randn(shape.model, shape.heads * shape.width, generator=make)
    mask = TileMask.causal(1, shape.tokens, shape.tokens)
    layers = {
        name: TiledRowParallel(weight, blocks=blocks, start=link.start)
        for name, blocks in (("whole", 1), ("fixed", FIXED), ("auto", "auto"))
    }  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in layers}
    best: dict[str, tuple[float, Lanes]] = {}
    outputs = {}
    for turn in range(rounds + 1):
        for name, layer in layers.items():
            link.forget()
            dist.barrier()
            begin = time.perf_counter()
            with torch.no_grad():
                outputs[name] = layer(q, k, v, mask=mask)
            taken = time.perf_counter() - begin
            if turn:  # the first chooses the number of blocks
                times[name].append(taken)
                lanes = link.lanes(begin)
                best[name] = min(best.get(name, (taken, lanes)), (taken, lanes), key=lambda one: one[0])
    assert torch.allclose(outputs["whole"], outputs["fixed"], atol=1e-4)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    lanes_of = {name: lanes for name, (_, lanes) in best.items()}
    return {
        **asdict(shape),
        "mib": shape.batch * shape.tokens * shape.model * 4 / 2**20,
        "blocks": {name: len(lanes["compute"]) for name, lanes in lanes_of.items()},
        "ms": {name: seconds * 1e3 for name, seconds in medians.items()},
        "ratio": {name: medians["whole"] / seconds for name, seconds in medians.items() if name != "whole"},
        "sum_share": _sum_share(lanes_of["whole"]),
        "lanes": lanes_of,
    }


def _sum_share(lanes: Lanes) -> float:
    """Of the whole time, how much the sum takes where it comes last."""
    _, begin, end = lanes["sum"][0]
    return (end - begin) / end


def draw(row: dict[str, Any], ms_per_mib: float, rounds: int, path: Path) -> None:
    """Two time lines under each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = ("#3b7dd8", "#2a9d62", "#f2a33a", "#d8503b", "#8b5fbf", "#5aa9b8")
    figure = Figure(figsize=(12, 4.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    plots = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.8, bottom=0.12, hspace=0.5)
    for axes, lanes in zip(plots, (row["lanes"][name] for name in ("whole", "fixed")), strict=True):
        for height, lane in enumerate(("sum", "compute")):
            for block, begin, end in lanes[lane]:
                axes.barh(height, (end - begin) * 1e3, left=begin * 1e3, height=0.62, color=colors[block % len(colors)], edgecolor="white")
                axes.text((begin + end) * 500, height, str(block), ha="center", va="center", color="white", fontsize=9)
        count, last = len(lanes["compute"]), max(end for _, _, end in lanes["sum"]) * 1e3
        axes.axvline(last, color="#20262e", lw=1, ls=(0, (4, 3)))
        axes.set_yticks([0, 1], ["all-reduce", "compute"])
        axes.set_title(f"{count} block{'s' if count > 1 else ''}: complete after {last:.0f} ms", loc="left", fontsize=10.5)
        axes.spines[["top", "right"]].set_visible(False)
    plots[-1].set_xlabel("milliseconds, process 0 of 2")
    title = "Attention and output projection over two processes, all-reduced in blocks of equal work"
    said = (
        f"{row['batch']} x {row['tokens']} tokens, {row['said']}: gloo on one machine, injected link delay of {ms_per_mib:g} ms per MiB; "
        f"fastest of {rounds} runs"
    )
    figure.text(0.09, 0.93, title, fontsize=13, fontweight="bold")
    figure.text(0.09, 0.875, said, fontsize=10, color="#6b7280")
    figure.savefig(path, pil_kwargs={"optimize": True})


def main() -> None:
    """Run two processes, print what each shape took, and draw one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ms-per-mib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder, asked.ms_per_mib, asked.rounds), nprocs=SIZE)
        found = torch.load(Path(folder) / "found.pt", weights_only=False)
    for row in found:
        shape, last = f"{row['batch']} x {row['tokens']} tokens, {row['said']}", f"{row['sum_share']:.0%} of {row['ms']['whole']:.1f} ms"
        print(f"{shape}: the sum is {last} where it comes last")
        for name, ratio in row["ratio"].items():
            print(f"    {row['blocks'][name]} blocks ({name}): {row['ms'][name]:.1f} ms, {ratio:.2f} x")
    if asked.json:
        rows = [{name: value for name, value in row.items() if name != "lanes"} for row in found]
        asked.json.write_text(json.dumps({"ms_per_mib": asked.ms_per_mib, "rounds": asked.rounds, "shapes": rows}, indent=1))
    if asked.picture:
        draw(found[DRAWN], asked.ms_per_mib, asked.rounds, asked.picture)


if __name__ == "__main__":
    main()
