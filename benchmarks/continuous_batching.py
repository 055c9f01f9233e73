"""Continuous batching of SmolLM2: tokens per second of transformers' own attention and of ours, for requests of different lengths.

One process, one model and one manager per contender, with the same pages. In the first round prompts are read; their pages are kept, and
later rounds find all but the last of each prompt in the cache, so that generating is what they time. Contenders take turns; their tokens
are compared before ratios count. Times are of `generate_batch` as a whole, threads and their end included.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.harness.contenders import declare_torchvision_operators
from benchmarks.harness.statistics import ratio_of_medians, spread
from benchmarks.model_attention import _model, _prompt

__all__ = ["CONTENDERS", "TITLE", "measure_batching"]

TITLE = "continuous batching[SmolLM2]"
CONTENDERS = ("torchwrap", "sdpa", "eager")
"""transformers gives a model with eager attention its `paged|eager`."""
LENGTHS = (1024, 256, 768, 512, 384, 896)
"""Tokens of the prompts."""
PAGE = 32


def measure_batching(
    *, tokens: int = 16, rounds: int = 3, contenders: tuple[str, ...] = CONTENDERS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Everything of this module.

    Args:
        tokens: generated for each request.
        rounds: turns of each contender, after the first.
        contenders: names of `CONTENDERS`.
        say: told of every round.

    Returns:
        `tokens_per_s` and `first_s` (prompts read, seconds) per contender, `ratio` and `first_ratio` of each rival to ours (above 1: ours
        is faster), `equal_tokens`.
    """
    declare_torchvision_operators()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of every manager that is kept
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = {name: _model(name, torch.float32) for name in contenders}
    try:
        return {
            "title": TITLE,
            "lengths": LENGTHS,
            "page": PAGE,
            "tokens": tokens,
            "rounds": rounds,
            **_measured(models, tokens, rounds, say),
        }
    finally:
        for model in models.values():
            model.destroy_cached_continuous_batching_manager()
        torch.set_num_threads(threads)


def _measured(models: dict[str, Any], tokens: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    text = _prompt(sum(LENGTHS))[0].tolist()
    prompts = [text[sum(LENGTHS[:index]) :][:length] for index, length in enumerate(LENGTHS)]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    chosen: dict[str, Any] = {}
    for index in range(rounds + 1):
        for name in list(models)[index % len(models) :] + list(models)[: index % len(models)]:
            began = time.perf_counter()
            found = _generated(models[name], prompts, tokens)
            seconds[name].append(time.perf_counter() - began)
            if found != chosen.setdefault(name, found):
                raise RuntimeError(f"{name} gives other tokens with its prompts in the cache")
        said = (f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        say(f"{TITLE} round {index}: " + "; ".join(said))
    mine = seconds["torchwrap"]
    count = tokens * len(prompts)
    result: dict[str, Any] = {
        "equal_tokens": all(found == chosen["torchwrap"] for found in chosen.values()),
        "threads": torch.get_num_threads(),
    }
    result["first_s"] = {name: values[0] for name, values in seconds.items()}
    result["tokens_per_s"] = {name: spread([count / value for value in values[1:]]) for name, values in seconds.items()}
    if result["equal_tokens"]:
        rivals = {name: values for name, values in seconds.items() if name != "torchwrap"}
        result["first_ratio"] = {name: values[0] / mine[0] for name, values in rivals.items()}
        result["ratio"] = {name: ratio_of_medians(values[1:], mine[1:]) for name, values in rivals.items()}
    say(f"{TITLE}: " + "; ".join(f"{name} {count / median(values[1:]):.1f} tokens/s" for name, values in seconds.items()))
    return result


def _generated(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=sum(LENGTHS) // PAGE * 3 // 2, page_size=PAGE, max_batch_tokens=512)
    results = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=pages, persistent_manager=True)
    return [result.generated_tokens for result in results.values()]
