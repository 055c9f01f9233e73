"""What the processes of test_sequence.py do: transformers models of whose sequences each process has a part."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import torchwrap as tw
from tests.integrations import tiny
from torchwrap.attention.distributed import ring
from torchwrap.attention.distributed.sequence import DividedSequence
from torchwrap.integrations.transformers.sequence import shard_inputs

LENGTH = 24
IDS = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(5))
LEFT_PADDED = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.arange(9)[None]), torch.tensor(0))
OSS = dict(tiny._HEAD8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5, num_hidden_layers=2)
TEXT = dict(tiny._TEXT, num_hidden_layers=2)
MODELS = {
    "llama": tiny.Case("LlamaForCausalLM", "LlamaConfig", TEXT),
    "mistral": tiny.Case("MistralForCausalLM", "MistralConfig", dict(TEXT, sliding_window=5)),
    "gemma2": tiny.Case("Gemma2ForCausalLM", "Gemma2Config", dict(tiny._HEAD8, sliding_window=5, num_hidden_layers=2)),
    "gpt2": tiny.Case("GPT2LMHeadModel", "GPT2Config", dict(tiny._GPT, n_layer=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt_oss": tiny.Case("GptOssForCausalLM", "GptOssConfig", OSS),
}
WAYS = ("zigzag", "contiguous", "ulysses")


def batch(padded: bool) -> dict[str, Tensor]:
    """What the model of one process is called with."""
    if not padded:
        return {"input_ids": IDS, "labels": IDS}
    positions = (LEFT_PADDED.cumsum(1) - 1).clamp(min=0)
    labels = IDS.masked_fill(LEFT_PADDED == 0, -100)
    return {"input_ids": IDS, "labels": labels, "attention_mask": LEFT_PADDED, "position_ids": positions}


def step(rank: int, size: int, *, name: str, way: Any, padded: bool = False, checkpointing: bool = False) -> dict[str, Any]:
    """Logits, loss and gradients of the whole, put together of those of all processes."""
    model: Any = MODELS[name].build()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    sequence = DividedSequence(None, way)
    tw.fast_attention(model, sp_group=dist.group.WORLD, ring=way)
    out = model(**shard_inputs(batch(padded), sequence))
    out.loss.backward()
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    stats = tw.handle_of(model, "fast_attention").stats()["served"]
    tw.unwrap(model)
    with torch.no_grad():
        alone = model(IDS).logits
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "logits": sequence.whole(out.logits),
        "loss": loss,
        "grads": grads,
        "served": stats,
        "alone": alone,
        "cache": out.past_key_values,
    }


def refused(rank: int, size: int) -> dict[str, Any]:
    """Calls that cannot be; each must raise in every process, and the next call must work."""
    model: Any = tw.fast_attention(MODELS["llama"].build(), sp_group=dist.group.WORLD)
    sequence = DividedSequence()
    mine = shard_inputs({"input_ids": IDS}, sequence)
    ids, positions = mine["input_ids"], mine["position_ids"]
    length = ids.shape[1]
    in_order = torch.arange(rank * length, (rank + 1) * length)[None]
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(ids, max_new_tokens=2, do_sample=False),
        "use_cache": lambda: model(ids, use_cache=True),
        "weights": lambda: model(ids, output_attentions=True),
        "labels": lambda: model(ids, labels=ids),
        "mask": lambda: model(ids, attention_mask=torch.ones(2, 1, length, length)),
        "nothing": lambda: model(),
        "masks by type": lambda: model(ids, attention_mask={"full_attention": None}),
        "odd": lambda: model(ids[:, 1:]),
        "other layout": lambda: model(ids, position_ids=in_order),
        "other part": lambda: model(ids, position_ids=positions + rank),
        "only one process": lambda: model(ids, use_cache=True if rank == 0 else None),
        "lengths": lambda: model(ids[:, : length - 2 * rank]),
        "masks": lambda: model(ids, attention_mask=torch.ones_like(ids) if rank else None),
    }
    said: dict[str, Any] = {}
    with torch.no_grad():
        for case, call in calls.items():
            try:
                said[case] = call()
            except Exception as error:
                said[case] = error
        said["logits"] = sequence.whole(model(ids).logits)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    try:
        model.train()(ids)
    except Exception as error:
        said["dropout"] = error
    return said


def unwrappable(rank: int, size: int) -> dict[str, Any]:
    """Models and settings that are refused before anything is touched."""
    from tests.integrations.attending import FAMILIES

    said: dict[str, Any] = {}
    models = {name: FAMILIES[name].build for name in ("bert", "t5", "vit", "llava")}
    models["classifier"] = tiny.case("LlamaForSequenceClassification").build
    models["torch"] = lambda: torch.nn.TransformerEncoderLayer(16, 2, 32)  # type: ignore[assignment]
    for case, make in models.items():
        try:
            tw.fast_attention(make(), sp_group=dist.group.WORLD)
        except Exception as error:
            said[case] = error
    for case, settings in {
        "backend": {"backend": "sdpa"},
        "name": {"sp_group": "no such group"},
        "both": {"tp_group": dist.group.WORLD},
    }.items():
        try:
            tw.fast_attention(MODELS["llama"].build(), **{"sp_group": dist.group.WORLD, **settings})
        except Exception as error:
            said[case] = error
    alone = dist.new_group([0])
    try:
        tw.fast_attention(MODELS["llama"].build(), sp_group=alone)
    except Exception as error:
        said["member"] = error
    return said


def broken(rank: int, size: int) -> dict[str, Any]:
    """One process fails in the first layer's ring; what the others say of it in the next layer, and all in a later call."""
    everyone = list(range(size))
    # What is done once has time, and all begin together: from there on a process is late only if it has failed.
    anew = dist.new_group(everyone)
    with torch.no_grad():
        tw.fast_attention(MODELS["llama"].build(), sp_group=anew)(**shard_inputs({"input_ids": IDS}, DividedSequence(anew)))
    model: Any = MODELS["llama"].build()
    dist.barrier(anew)
    groups = [dist.new_group(everyone, timeout=timedelta(seconds=2)), anew]
    tw.fast_attention(model, sp_group=groups[0])
    mine = shard_inputs({"input_ids": IDS}, DividedSequence(groups[0]))
    plain, steps = ring._Ring.rectangles, [0]

    def rectangles(self: Any, step: int) -> Any:
        steps[0] += 1
        if steps[0] == 1:
            raise MemoryError("no room for the first step")
        return plain(self, step)

    if rank == size - 1:
        ring._Ring.rectangles = rectangles  # type: ignore[method-assign]
    said: dict[str, Any] = {}
    for when in ("first", "later"):
        try:
            with torch.no_grad():
                model(**mine)
        except Exception as error:
            said[when] = error
        ring._Ring.rectangles = plain  # type: ignore[method-assign]
    tw.unwrap(model)
    tw.fast_attention(model, sp_group=groups[1])
    sequence = DividedSequence(groups[1])
    with torch.no_grad():
        return {**said, "anew": sequence.whole(model(**mine).logits)}


def too_few_heads(rank: int, size: int) -> dict[str, Any]:
    """Two key heads over four processes."""
    model: Any = tw.fast_attention(MODELS["llama"].build(), sp_group=dist.group.WORLD, ring="ulysses")
    try:
        return {"out": model(**shard_inputs({"input_ids": IDS}, DividedSequence(None, "ulysses")))}
    except Exception as error:
        return {"error": error}


Case = Callable[[int, int], dict[str, Any]]
STEPS: dict[str, Case] = {
    **{f"llama {way}": partial(step, name="llama", way=way) for way in WAYS},
    **{f"llama {way} padded": partial(step, name="llama", way=way, padded=True) for way in ("zigzag", "ulysses")},
    "llama checkpointing": partial(step, name="llama", way="zigzag", checkpointing=True),
    "mistral zigzag": partial(step, name="mistral", way="zigzag"),
    "gemma2 contiguous": partial(step, name="gemma2", way="contiguous"),
    "gpt2 zigzag": partial(step, name="gpt2", way="zigzag"),
    "gpt_oss ulysses": partial(step, name="gpt_oss", way="ulysses"),
}
FOUR = {"llama zigzag": STEPS["llama zigzag"], "mistral zigzag": STEPS["mistral zigzag"], "too few heads": too_few_heads}


def prepare() -> None:
    """Have every module imported that the cases need, once for all processes."""
    for case in MODELS.values():
        case.build()


def cases_of(size: int) -> dict[str, Case]:
    """All cases for two processes; for four, those in which it makes a difference."""
    return FOUR if size == 4 else {**STEPS, "refused": refused, "unwrappable": unwrappable, "broken": broken}
