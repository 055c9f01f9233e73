"""Into how many blocks to cut the rows of a causal attention, and where, so that its all-reduce hides behind it.

Block b is reduced while block b + 1 is computed. With n blocks of equal work the whole takes about `max(compute, communication) + edge`,
the edge being one block, and each block costs the latency of one more all-reduce: more blocks are better until latency eats the gain.
Later rows of a causal mask see more keys, so equal work is not equal rows: edges lie where the sum of visible keys reaches equal parts,
at square roots for a whole triangle.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, the tiling-AllReduce strategy; equal
work and the choice of the count are ours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from torchwrap.attention.distributed.works import Group, StartSum, start_sum
from torchwrap.attention.masks.mask import TileMask

__all__ = ["Link", "best_count", "equal_work", "measure_link", "pipeline_seconds"]

MOST_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Link:
    """What an all-reduce takes: `latency_s + bytes / bytes_per_s` seconds."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        """Of one all-reduce of so many bytes."""
        return self.latency_s + nbytes / self.bytes_per_s


def equal_work(rows: int, keys: int, count: int, *, mask: TileMask | None = None, row_cost: float = 0.0) -> list[tuple[int, int]]:
    """Cut `rows` query rows into at most `count` runs of about equal work.

    Args:
        rows: Sq.
        keys: Sk.
        count: wanted number of runs, at least 1.
        mask: decides how many keys a row sees (its band; padding is not looked at). None: all.
        row_cost: work of a row besides its keys, in keys: the projection costs about as much as attending E / 2 of them.

    Returns:
        (first, end) of each run, in order; none is empty, together they are all rows.
    """
    if not rows:
        return []
    work = torch.full((rows,), float(keys), dtype=torch.float64, device="cpu")
    if mask is not None:
        position = torch.arange(rows, dtype=torch.float64, device="cpu") + (mask.first_query() - mask.kv_offset)
        last = work if mask.right is None else (position + mask.right + 1).clamp(0, keys)
        first = torch.zeros_like(work) if mask.left is None else (position - mask.left).clamp(0, keys)
        work = (last - first).clamp(min=0)
    total = torch.cumsum(work + row_cost + 1e-9, 0)
    targets = total[-1] * torch.arange(1, count, dtype=torch.float64, device="cpu") / count
    edges = sorted({0, rows, *(int(edge) + 1 for edge in torch.searchsorted(total, targets).tolist() if int(edge) + 1 < rows)})
    return list(pairwise(edges))


def pipeline_seconds(count: int, compute_s: float, nbytes: int, link: Link, block_s: float = 0.0) -> float:
    """Seconds until the last of `count` equal blocks is reduced.

    Args:
        count: of blocks.
        compute_s: seconds of the whole attention and projection in one block.
        nbytes: of the whole result.
        link: of the group.
        block_s: seconds that each further block adds to the computing.
    """
    compute = compute_s + (count - 1) * block_s
    each, reduce = compute / count, link.seconds(nbytes / count)
    # The slower of the two is busy all the time; of the other only one block sticks out.
    return max(compute + reduce, each + count * reduce)


def best_count(compute_s: float, nbytes: int, link: Link, block_s: float = 0.0) -> int:
    """The fewest blocks whose predicted time is within a fiftieth of the least: the minimum is flat, and what is not predicted grows.

    Args:
        compute_s: seconds of the whole attention and projection in one block.
        nbytes: of the whole result.
        link: of the group; equal on all its processes, or they would cut differently.
        block_s: seconds that each further block adds to the computing, likewise.
    """
    times = {count: pipeline_seconds(count, compute_s, nbytes, link, block_s) for count in range(1, MOST_BLOCKS + 1)}
    return min(count for count, seconds in times.items() if seconds <= 1.02 * min(times.values()))


def measure_link(
    group: Group, device: torch.device, *, nbytes: int = 1 << 20, repeats: int = 5, start: StartSum = start_sum
) -> Link:  # fmt: skip
    """Time a sum of 4 bytes and one of `nbytes`; every process of the group must call it, and all get the same answer.

    Args:
        group: of processes.
        device: of the tensors.
        nbytes: of the larger sum.
        repeats: of each, of which the median counts.
        start: begins a sum and returns its work.
    """

    def seconds(count: int) -> float:
        tensor = torch.zeros(count, device=device)
        times = []
        for _ in range(repeats):
            dist.barrier(group)
            begin = time.perf_counter()
            start(tensor, group).wait()
            float(tensor[0])  # waits for a device
            times.append(time.perf_counter() - begin)
        return sorted(times)[repeats // 2]

    found = torch.tensor([seconds(1), seconds(nbytes // 4)], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    latency, whole = found.tolist()
    return Link(latency, nbytes / max(whole - latency, 1e-9))
