"""What the processes of test_distributed.py do, and the inputs, which every process and the test itself make from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchwrap.attention.distributed import works
from torchwrap.attention.distributed.ring import Layout, ring_attend, shard
from torchwrap.attention.distributed.tiled import TiledColumnParallel, TiledRowParallel
from torchwrap.attention.distributed.ulysses import ulysses_attend
from torchwrap.attention.masks.mask import TileMask

TOKENS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, MODEL = 48, 8, 4, 8, 6, 20

MASKS: dict[str, Callable[[], TileMask | None]] = {
    "full": lambda: None,
    "causal": lambda: TileMask.causal(1, TOKENS, TOKENS),
    "window": lambda: TileMask.window(1, TOKENS, TOKENS, 9),
    "padded": lambda: TileMask.padded([TOKENS, TOKENS // 3], TOKENS, TOKENS),
}


@dataclass(frozen=True)
class Inputs:
    """Of attention over the whole sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor
    grad: Tensor

    @staticmethod
    def make() -> Inputs:
        make = torch.Generator().manual_seed(7)
        shapes = [(2, HEADS, TOKENS, WIDTH), (2, KV_HEADS, TOKENS, WIDTH), (2, KV_HEADS, TOKENS, VALUE_WIDTH), (HEADS,)]
        return Inputs(*(torch.randn(shape, generator=make) for shape in [*shapes, (2, HEADS, TOKENS, VALUE_WIDTH)]))


@dataclass(frozen=True)
class Layer:
    """Weights of one attention layer and its input: q, k and v projections in one, output projection, bias."""

    x: Tensor
    qkv: Tensor
    out: Tensor
    bias: Tensor
    grad: Tensor

    @staticmethod
    def make() -> Layer:
        make = torch.Generator().manual_seed(8)
        rows = HEADS * WIDTH + KV_HEADS * (WIDTH + VALUE_WIDTH)
        shapes = [(2, TOKENS, MODEL), (rows, MODEL), (MODEL, HEADS * VALUE_WIDTH), (MODEL,), (2, TOKENS, MODEL)]
        scales = (1.0, MODEL**-0.5, (HEADS * VALUE_WIDTH) ** -0.5, 1.0, 1.0)
        return Layer(*(torch.randn(shape, generator=make) * scale for shape, scale in zip(shapes, scales, strict=True)))


def own_rows(rank: int, size: int) -> Tensor:
    """Rows of the q, k and v projection that belong to a process."""
    sections = torch.arange(HEADS * WIDTH + KV_HEADS * (WIDTH + VALUE_WIDTH)).split(
        [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * VALUE_WIDTH]
    )
    return torch.cat([section.chunk(size)[rank] for section in sections])


def split_heads(projected: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of `1 / parts` of the heads."""
    sizes = [HEADS * WIDTH // parts, KV_HEADS * WIDTH // parts, KV_HEADS * VALUE_WIDTH // parts]
    q, k, v = projected.split(sizes, -1)
    heads = (HEADS // parts, KV_HEADS // parts, KV_HEADS // parts)
    return tuple(one.unflatten(-1, (count, -1)).transpose(1, 2) for one, count in zip((q, k, v), heads, strict=True))  # type: ignore[return-value]


def tiled(rank: int, size: int, *, mask: str, blocks: Any) -> dict[str, Any]:
    """The layer with its heads divided, forward and backward."""
    layer, rows = Layer.make(), own_rows(rank, size)
    x, qkv = layer.x.clone().requires_grad_(), layer.qkv[rows].requires_grad_()
    out, bias = layer.out.chunk(size, 1)[rank].clone().requires_grad_(), layer.bias.clone().requires_grad_()
    row = TiledRowParallel(out, bias, blocks=blocks)
    column = TiledColumnParallel(qkv, blocks=3)
    q, k, v = split_heads(column(x), size)
    y = row(q, k, v, mask=MASKS[mask]())
    y.backward(layer.grad)
    return {"y": y.detach(), "x": x.grad, "qkv": qkv.grad, "out": out.grad, "bias": bias.grad, "count": list(row.tiling.chosen.values())}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of what is sent to other processes, one entry for each message."""
    sent: list[int] = []
    plain = works.exchange

    def exchange(out: Any, into: Any, group: Any) -> Any:
        sent.extend(one.nbytes for one in out)
        return plain(out, into, group)

    from torchwrap.attention.distributed import ring

    ring.exchange = exchange  # type: ignore[assignment]
    try:
        yield sent
    finally:
        ring.exchange = plain


def ring(rank: int, size: int, *, mask: str, layout: Layout, options: dict[str, Any]) -> dict[str, Any]:
    """Ring attention of this process' part, forward and backward."""
    inputs = Inputs.make()
    q, k, v = (shard(one, 2, rank, size, layout).requires_grad_() for one in (inputs.q, inputs.k, inputs.v))
    sinks = inputs.sinks.clone().requires_grad_() if options.pop("sinks", False) else None
    with counted() as sent:
        out, lse = ring_attend(q, k, v, mask=MASKS[mask](), layout=layout, sinks=sinks, **options)
        forward = sum(sent)
        out.backward(shard(inputs.grad, 2, rank, size, layout))
    grads = {"q": q.grad, "k": k.grad, "v": v.grad, "sinks": None if sinks is None else sinks.grad}
    return {"out": out.detach(), "lse": lse.detach(), "sent": forward, "sent backward": sum(sent) - forward, **grads}


def ulysses(rank: int, size: int, *, mask: str) -> dict[str, Any]:
    """Attention with heads exchanged for tokens, forward and backward."""
    inputs = Inputs.make()
    q, k, v = (shard(one, 2, rank, size, "contiguous").requires_grad_() for one in (inputs.q, inputs.k, inputs.v))
    out = ulysses_attend(q, k, v, mask=MASKS[mask](), sinks=inputs.sinks)
    out.backward(shard(inputs.grad, 2, rank, size, "contiguous"))
    return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def leaving(rank: int, size: int) -> dict[str, Any]:
    """All processes but the first stop after two blocks; what the first says of it, and how long it took."""
    group = dist.new_group(list(range(size)))
    layer = Layer.make()
    q, k, v = split_heads(layer.x @ layer.qkv[own_rows(rank, size)].t(), size)
    weight = layer.out.chunk(size, 1)[rank]
    begun = [0]

    def start(part: Tensor, group: Any) -> Any:
        begun[0] += 1
        if rank and begun[0] > 4 + 2:
            raise RuntimeError("this process leaves")
        return works.start_sum(part, group)

    row = TiledRowParallel(weight, group=group, blocks=4, start=start)
    # What is done once has time, and all begin together: from there on a process is late only if it has left.
    row(q, k, v, mask=MASKS["causal"]())
    dist.barrier(group)
    row.tiling.timeout_s = 1.0
    said: dict[str, Any] = {}
    for when in ("error", "later"):
        try:
            row(q, k, v, mask=MASKS["causal"]())
        except Exception as error:
            said[when] = error
    return said


def refused(rank: int, size: int) -> dict[str, Any]:
    """A call that cannot be computed in any process, and the next one over the same group."""
    group = dist.new_group(list(range(size)))
    inputs = Inputs.make()
    q, k, v = (shard(one, 2, rank, size) for one in (inputs.q, inputs.k, inputs.v))
    layer = Layer.make()
    row = TiledRowParallel(layer.out.chunk(size, 1)[rank], group=group, blocks=3)
    heads = split_heads(layer.x @ layer.qkv[own_rows(rank, size)].t(), size)
    said: dict[str, Any] = {}
    for case, call in {
        "rows": lambda: row(*heads, softcap=-1.0), "ring": lambda: ring_attend(q, k, v, softcap=-1.0, group=group),
        "dtype": lambda: ring_attend(*(one.to(torch.float8_e4m3fn) for one in (q, k, v)), group=group),
    }.items():  # fmt: skip
        try:
            call()
        except Exception as error:
            said[case] = error
    said["y"] = row(*heads)
    said["out"] = ring_attend(q, k, v, group=group)[0]
    return said


def unlike(rank: int, size: int) -> dict[str, Any]:
    """Calls with which the processes come each with something else, and the next one over the same group."""
    group = dist.new_group(list(range(size)))
    inputs = Inputs.make()
    q, k, v = (shard(one, 2, rank, size) for one in (inputs.q, inputs.k, inputs.v))
    shorter = [one[:, :, : one.shape[2] // (1 + rank)] for one in (q, k, v)]
    narrower = [one.to(torch.bfloat16) if rank else one for one in (q, k, v)]
    layer = Layer.make()
    heads = split_heads(layer.x @ layer.qkv[own_rows(rank, size)].t(), size)
    weight = layer.out.chunk(size, 1)[rank]
    said: dict[str, Any] = {}
    for case, call in {
        "length": lambda: ring_attend(*shorter, group=group), "dtype": lambda: ring_attend(*narrower, group=group),
        "layout": lambda: ring_attend(q, k, v, layout="contiguous" if rank else "zigzag", group=group),
        "heads": lambda: ulysses_attend(*shorter, group=group),
        "mask": lambda: ring_attend(q, k, v, mask=MASKS["causal" if rank else "window"](), group=group),
        "padding": lambda: ring_attend(q, k, v, mask=TileMask.padded([TOKENS, TOKENS - rank], TOKENS, TOKENS), group=group),
        "scale": lambda: ring_attend(q, k, v, scale=0.5 + rank, group=group),
        "softcap": lambda: ring_attend(q, k, v, softcap=3.0 if rank else None, group=group),
        "exchanged mask": lambda: ulysses_attend(q, k, v, mask=MASKS["causal"]() if rank else None, group=group),
        "exchanged scale": lambda: ulysses_attend(q, k, v, scale=0.5 + rank, group=group),
        "blocks": lambda: TiledRowParallel(weight, group=group, blocks=2 + rank)(*heads),
        "band": lambda: TiledRowParallel(weight, group=group, blocks=3)(*heads, mask=MASKS["causal"]() if rank else None),
    }.items():  # fmt: skip
        try:
            call()
        except Exception as error:
            said[case] = error
    gone = dist.new_group(list(range(size)))
    dist.destroy_process_group(gone)
    try:
        ring_attend(q, k, v, group=gone)
    except Exception as error:
        said["gone"] = error
    # What hides nothing is no mask, in whatever way it is said.
    nothing = TileMask.padded([TOKENS, TOKENS], TOKENS, TOKENS, causal=False) if rank else None
    said["out"] = ring_attend(q, k, v, mask=nothing, group=group)[0]
    return said


RINGS = {
    "full": {},
    "causal": {},
    "window": {},
    "padded": {"sinks": True, "softcap": 3.0, "scale": 0.4},
}
Case = Callable[[int, int], dict[str, Any]]
CASES: dict[str, Case] = {
    **{f"ring {layout} {mask}": partial(ring, mask=mask, layout=layout, options=dict(options))
       for layout in ("zigzag", "contiguous") for mask, options in RINGS.items()},
    **{f"tiled {mask} {blocks}": partial(tiled, mask=mask, blocks=blocks) for mask, blocks in
       [("full", 1), ("causal", 1), ("causal", 5), ("window", 3), ("padded", 100), ("causal", "auto")]},
    **{f"ulysses {mask}": partial(ulysses, mask=mask) for mask in MASKS},
    "leaving": leaving,
    "refused": refused,
    "unlike": unlike,
}  # fmt: skip


def cases_of(size: int) -> dict[str, Case]:
    """All cases for two processes; for more, those in which the number of processes changes what happens."""
    few = ("ring", "tiled causal 5", "ulysses causal")
    return {name: case for name, case in CASES.items() if size == 2 or name.startswith(few)}
