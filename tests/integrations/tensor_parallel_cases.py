"""What the processes of test_tensor_parallel.py do: transformers models divided by their `tp_plan`, with and without tiled sums."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchwrap as tw
from tests.integrations import tiny
from torchwrap.attention.distributed import tiled
from torchwrap.core import errors

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(5))
LEFT_PADDED = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.arange(9)[None]), torch.tensor(0))
MODELS = {
    "llama": tiny.Case("LlamaForCausalLM", "LlamaConfig", dict(tiny._TEXT, attention_bias=True, num_hidden_layers=2)),
    "qwen2": tiny.Case("Qwen2ForCausalLM", "Qwen2Config", dict(tiny._TEXT, num_hidden_layers=2)),
    "mixtral": tiny.Case("MixtralForCausalLM", "MixtralConfig", dict(tiny._TEXT, num_local_experts=4, num_hidden_layers=2)),
}


def divided(name: str) -> Any:
    """The model, saved by one process and loaded by all, each with its heads."""
    import transformers
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    if dist.get_rank() == 0:
        MODELS[name].build().save_pretrained(folder[0])
    dist.broadcast_object_list(folder)
    config = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    return getattr(transformers, MODELS[name].kind).from_pretrained(folder[0], distributed_config=config).eval()


def results(model: Any) -> dict[str, Any]:
    """Logits, generated tokens, and the gradients of a training step, whole on every process."""
    with torch.no_grad():
        logits = model(IDS, attention_mask=LEFT_PADDED).logits
    options = dict(attention_mask=LEFT_PADDED, max_new_tokens=6, do_sample=False)
    tokens = model.generate(IDS, **options)
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    grads = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return {"logits": logits, "tokens": tokens, "grads": grads}


def whole(x: Any) -> Tensor:
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


@contextmanager
def counted() -> Iterator[list[int]]:
    """Into how many blocks each tiled call was cut."""
    counts: list[int] = []
    plain = tiled.Tiling.summed

    def summed(self: Any, rows: Any, weight: Any, bias: Any, count: int) -> Tensor:
        counts.append(count)
        return plain(self, rows, weight, bias, count)

    tiled.Tiling.summed = summed  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        tiled.Tiling.summed = plain  # type: ignore[method-assign]


def model(rank: int, size: int, *, name: str, blocks: Any) -> dict[str, Any]:
    """A model before, while and after its sums are tiled."""
    made = divided(name)
    before = results(made)
    tw.fast_attention(made, allreduce_blocks=blocks)
    with counted() as counts:
        tiled_results = results(made)
    notes = tw.describe(made).notes if hasattr(tw.describe(made), "notes") else str(tw.describe(made))
    tw.unwrap(made)
    with counted() as later:
        after = results(made)
    return {"before": before, "tiled": tiled_results, "after": after, "counts": counts, "later": later, "notes": str(notes)}


def watched(rank: int, size: int) -> dict[str, Any]:
    """Somebody wants to see what enters the projection, or changes it: then nothing is tiled."""
    made = tw.fast_attention(divided("llama"), allreduce_blocks=3)
    seen: list[Tensor] = []
    hooked = made.model.layers[0].self_attn.o_proj
    hook = hooked.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with counted() as counts, torch.no_grad():
        logits = made(IDS).logits
    hook.remove()
    gated = made.model.layers[1].self_attn

    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 1.0)

    gated.o_proj = Adapter(gated.o_proj)
    with counted() as adapted, torch.no_grad():
        made(IDS)
    return {"logits": logits, "counts": counts, "adapted": adapted, "shape": tuple(seen[0].shape), "kind": type(seen[0]).__name__}


def refused(rank: int, size: int) -> dict[str, Any]:
    """Groups that do not fit the model."""
    alone = [dist.new_group([one]) for one in range(size)][rank]
    said = {}
    for case, target, group in (("others", divided("llama"), alone), ("none", MODELS["llama"].build(), dist.group.WORLD)):
        try:
            tw.fast_attention(target, tp_group=group)
        except errors.TorchwrapError as error:
            said[case] = error
    return said


def broken(rank: int, size: int) -> dict[str, Any]:
    """One process fails between two blocks of the second layer; what all say of it then, later, and with another group."""
    groups = [dist.new_group(list(range(size))) for _ in range(2)]
    made = divided("llama")
    expected = results(made)
    tw.fast_attention(made, tp_group=groups[0], allreduce_blocks=4)
    plain, begun = tiled.Rows.part, [0]

    def part(self: Any, *args: Any) -> Tensor:
        begun[0] += 1
        if begun[0] == 4 + 3:
            raise MemoryError("no room for block 2 of the second layer")
        return plain(self, *args)

    # What is done once has time, and all begin together: from there on a process is late only if it has failed.
    with torch.no_grad():
        made(IDS)
    dist.barrier(groups[0])
    for projection in (layer.self_attn.o_proj for layer in made.model.layers):
        for layer in projection._torchwrap:
            layer.tiling.timeout_s = 1.0
    if rank:
        tiled.Rows.part = part  # type: ignore[method-assign]
    said: dict[str, Any] = {}
    for when in ("first", "later"):
        try:
            with torch.no_grad():
                made(IDS)
        except Exception as error:
            said[when] = error
        tiled.Rows.part = plain  # type: ignore[method-assign]
    tw.unwrap(made)
    tw.fast_attention(made, tp_group=groups[1], allreduce_blocks=4)
    return {**said, "anew": results(made)["logits"], "expected": expected["logits"]}


Case = Callable[[int, int], dict[str, Any]]
CASES: dict[str, Case] = {
    "llama 3": partial(model, name="llama", blocks=3),
    "qwen2 auto": partial(model, name="qwen2", blocks="auto"),
    "mixtral 5": partial(model, name="mixtral", blocks=5),
    "off": partial(model, name="llama", blocks=1),
    "watched": watched,
    "refused": refused,
    "broken": broken,
}


def prepare() -> None:
    """Have every module imported that the cases need, once for all processes."""
    importlib.import_module("torch.distributed.tensor")
    importlib.import_module("transformers.distributed")
    for case in MODELS.values():
        case.build()


def cases_of(size: int) -> dict[str, Case]:
    """All cases, for two processes."""
    return CASES
