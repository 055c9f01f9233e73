"""Attention of a whole model: tokens per second of SmolLM2 at a long context, and the memory of one forward.

Speed: one process, one model per contender, the same prompt of real text where it is at hand (`TORCHWRAP_DATA`), greedy tokens compared
before the clock counts. Contenders take turns, each after a prefill of its own.

Memory: a fresh child per contender and length; how far one forward of a padded batch takes the resident set above that of the loaded model
after a short call (the kernel's high-water mark, set back before). Only the last logits are computed and no cache is kept: both are the
same for all, and would hide what attention takes. The C library gives large blocks back to the system as soon as they are freed: what it
kept otherwise was up to a quarter of the figure, and another in each run. `nothing` is the same model with its queries for attention's
result: what all contenders take beside attention.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.cgroup import hwm_bytes, report, run_child
from benchmarks.harness.contenders import declare_torchvision_operators
from benchmarks.harness.rounds import ROOT
from benchmarks.harness.statistics import ratio_of_medians, spread

__all__ = ["CONTENDERS", "TITLE", "measure_model"]

TITLE = "attention[SmolLM2]"
CONTENDERS = ("torchwrap", "sdpa", "eager")
NOTHING = "nothing"
MEMORY = ((2, 1024), (2, 8192))
"""Sequences, tokens; half of each but the first is padding."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def measure_model(
    *, context: int = 4096, tokens: int = 32, rounds: int = 5, dtype: torch.dtype = torch.float32, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Everything of this module.

    Args:
        context: tokens of the prompt.
        tokens: generated in one turn.
        rounds: turns of each contender.
        dtype: of the weights.

    Returns:
        `tokens_per_s` and `prefill_s` per contender, `decode_ratio` and `prefill_ratio` of each rival to ours (above 1: ours is faster),
        `equal_tokens`; `memory`: added bytes by batch and contender, without attention as well, and ours over sdpa's.
    """
    declare_torchvision_operators()
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        speed = _speed(context, tokens, rounds, dtype, say)
    finally:
        torch.set_num_threads(threads)
    memory: dict[str, dict[str, float]] = {}
    for batch, length in MEMORY:
        # Eager attention at the greater length would take several times the memory of small machines for nothing new.
        names = (*(CONTENDERS if length <= 1024 else CONTENDERS[:2]), NOTHING)
        found: dict[str, float] = {name: _memory(name, batch, length) for name in names}
        found["ours_over_sdpa"] = found["torchwrap"] / found["sdpa"]
        memory[f"{batch} x {length}, padded"] = found
        say(f"{TITLE} memory of {batch} x {length}: " + ", ".join(f"{name} {found[name] / 2**20:.0f} MiB" for name in names))
    return {"title": TITLE, "context": context, "tokens": tokens, "rounds": rounds, "dtype": str(dtype), **speed, "memory": memory}


@torch.inference_mode()
def _speed(context: int, tokens: int, rounds: int, dtype: torch.dtype, say: Callable[[str], None]) -> dict[str, Any]:
    models = {name: _model(name, dtype) for name in CONTENDERS}
    ids = _prompt(context)
    caches: dict[str, Any] = {}
    chosen: dict[str, list[int]] = {}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds + 1):  # the first one warms up, and compares
        order = list(models)[index % len(models) :] + list(models)[: index % len(models)]
        for name in order:
            began = time.perf_counter()
            out = models[name](input_ids=ids, use_cache=True, logits_to_keep=1)
            prefill[name].append(time.perf_counter() - began)
            caches[name] = out.past_key_values
            first = out.logits[:, -1:].argmax(-1)
            del out
            began = time.perf_counter()
            chosen[name] = _decode(models[name], caches[name], first, tokens)
            decode[name].append((time.perf_counter() - began) / tokens)
            caches.clear()
        said = (f"{name} {1 / median(decode[name]):.1f} tokens/s, prefill {median(prefill[name]):.2f} s" for name in models)
        say(f"{TITLE} round {index}: " + "; ".join(said))
    equal = all(found == chosen["torchwrap"] for found in chosen.values())
    result: dict[str, Any] = {"equal_tokens": equal, "threads": torch.get_num_threads()}
    timed = {name: (prefill[name][1:], decode[name][1:]) for name in models}
    result["prefill_s"] = {name: spread(values) for name, (values, _) in timed.items()}
    result["tokens_per_s"] = {name: spread([1 / value for value in values]) for name, (_, values) in timed.items()}
    if equal or dtype != torch.float32:
        mine = timed["torchwrap"]
        result["prefill_ratio"] = {name: ratio_of_medians(values, mine[0]) for name, (values, _) in timed.items() if name != "torchwrap"}
        result["decode_ratio"] = {name: ratio_of_medians(values, mine[1]) for name, (_, values) in timed.items() if name != "torchwrap"}
    return result


def _decode(model: Any, cache: Any, token: torch.Tensor, count: int) -> list[int]:
    found = []
    for _ in range(count):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        found.append(int(token))
    return found


def _model(name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    import torchwrap
    from torchwrap.demo.weights import smollm2

    if name == NOTHING:
        _register_nothing()
    form = "sdpa" if name == "torchwrap" else name
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype, attn_implementation=form).eval()
    return torchwrap.fast_attention(model) if name == "torchwrap" else model


def _register_nothing() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NOTHING, lambda module, q, k, v, *rest, **options: (q.transpose(1, 2), None))
    AttentionMaskInterface.register(NOTHING, lambda *rest, **options: None)


def _prompt(length: int) -> torch.Tensor:
    """Token ids of running text, (1, length); of random ids where there is none."""
    from transformers import AutoTokenizer

    from torchwrap.demo.weights import smollm2

    data = os.environ.get("TORCHWRAP_DATA")
    path = Path(data) / "wikitext-2" / "valid.txt" if data else None
    if path is None or not path.exists():
        return torch.randint(3, 49000, (1, length), generator=torch.Generator().manual_seed(7))
    text = path.read_text()[: 12 * length]
    ids: torch.Tensor = AutoTokenizer.from_pretrained(smollm2())(text, return_tensors="pt").input_ids[:, :length]
    return ids


def _memory(name: str, batch: int, length: int) -> float:
    """Median of three children at a short length, where a page more or less is a part of the figure."""
    command = [sys.executable, "-m", "benchmarks.model_attention", name, str(batch), str(length)]
    environment = {"HF_HUB_OFFLINE": "1", **GIVES_BACK}
    repeats = 3 if length <= 1024 else 1
    found = [run_child(command, folder=ROOT, environment=environment, timeout_s=900).check() for _ in range(repeats)]
    return median(float(child.data["added_bytes"]) for child in found)


@torch.inference_mode()
def _child(name: str, batch: int, length: int) -> None:
    """One forward in this process, and what it added to the peak."""
    declare_torchvision_operators()
    model = _model(name, torch.float32)
    ids = torch.randint(3, 49000, (batch, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1:, : length // 2] = 0  # padded on the left, as for generation
    few = slice(length - 64, length)
    model(input_ids=ids[:, few], attention_mask=mask[:, few], use_cache=False, logits_to_keep=1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = hwm_bytes() or 0
    model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    report({"added_bytes": (hwm_bytes() or 0) - before})


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
