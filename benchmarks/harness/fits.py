"""The model fits: what does the wrapper cost then? Unwrapped and wrapped models side by side in one process.

The shape is SmolLM2-135M's, where a forward is short and any work per call shows. Turns alternate A B B A, so that slow drift of the
machine cancels, and outputs are compared before anything is timed.

A model is compared with itself unwrapped: the one in memory with a copy of it, the one opened from a folder with what transformers loads
from that folder, whose weights lie where the file's layout puts them (here 8 bytes past a cache line, which makes matrix-vector products
some 4 % slower than in freshly allocated memory; offload keeps that alignment because the last bits of float32 results depend on it).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import checkpoint
from benchmarks.harness.statistics import ratio_of_medians, spread

__all__ = ["BASELINES", "TITLE", "generate_timed", "load_models", "load_resident", "measure_fits"]

TITLE = "offload[llama-135M fits]"
BASELINES = {"torchwrap": "unwrapped", "torchwrap-folder": "unwrapped-folder"}


def measure_fits(*, rounds: int = 12, prompt: int = 64, tokens: int = 16) -> dict[str, Any]:
    """Speed of wrapped models as a fraction of the unwrapped one (1.0: no cost).

    Returns:
        `speed.<contender>.prefill` and `.decode`: median seconds of its `BASELINES` / its own; `speed_of_aligned.<contender>`: the same
        against `unwrapped` for all; the spreads; `equal_tokens`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        models = load_models(checkpoint("llama-135M"))
        ids = torch.randint(3, 49152, (1, prompt), generator=torch.Generator().manual_seed(7))
        outputs = {name: generate_timed(model, ids, tokens)[2] for name, model in models.items()}
        equal = all(torch.equal(output, outputs["unwrapped"]) for output in outputs.values())
        seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
        for index in range(rounds):
            names = list(models) if index % 2 else list(reversed(models))
            for name in (*names, *reversed(names)):
                prefill_s, decode_s, _ = generate_timed(models[name], ids, tokens)
                seconds[name]["prefill"].append(prefill_s)
                seconds[name]["decode"].append(decode_s)
    finally:
        torch.set_num_threads(threads)
    return {
        "title": TITLE,
        "prompt": prompt,
        "tokens": tokens,
        "equal_tokens": equal,
        "contenders": {name: {phase: spread(values) for phase, values in phases.items()} for name, phases in seconds.items()},
        "speed": {name: _speed(seconds, name, baseline) for name, baseline in BASELINES.items()},
        "speed_of_aligned": {name: _speed(seconds, name, "unwrapped") for name in seconds if name != "unwrapped"},
    }


def _speed(seconds: dict[str, dict[str, list[float]]], name: str, baseline: str) -> dict[str, float]:
    return {phase: ratio_of_medians(seconds[baseline][phase], values) for phase, values in seconds[name].items()}


def load_models(folder: Path) -> dict[str, Any]:
    """Unwrapped and wrapped in memory; unwrapped and wrapped from its folder."""
    import torchwrap

    return {
        "unwrapped": load_resident(folder, aligned=True),
        "torchwrap": torchwrap.offload(load_resident(folder, aligned=True)),
        "unwrapped-folder": load_resident(folder, aligned=False),
        "torchwrap-folder": torchwrap.offload.from_pretrained(folder),
    }


def load_resident(folder: Path, *, aligned: bool) -> Any:
    """What transformers loads from a folder, in memory of its own; at the addresses it gives weights modulo 64, or aligned ones."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        # Out of the mapped file, so that no contender pays page faults that another does not.
        data = parameter.data
        parameter.data = data.clone() if aligned else _copy_at(data, data.data_ptr() % 64)
    return model


def _copy_at(tensor: torch.Tensor, residue: int) -> torch.Tensor:
    """A copy whose address is `residue` modulo 64."""
    room = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
    start = (residue - room.data_ptr()) % 64
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@torch.inference_mode()
def generate_timed(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float, torch.Tensor]:
    """Greedy decoding; seconds of the prefill, seconds per decoded token, and the chosen tokens (1, tokens + 1)."""
    started = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    chosen = [output.logits[:, -1].argmax(-1, keepdim=True)]
    middle = time.perf_counter()
    for _ in range(tokens):
        output = model(input_ids=chosen[-1], past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        chosen.append(output.logits[:, -1].argmax(-1, keepdim=True))
    ended = time.perf_counter()
    return middle - started, (ended - middle) / tokens, torch.cat(chosen, dim=1)
