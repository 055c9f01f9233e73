"""Offload on one CUDA card: weights in page-locked host memory, or on disk, streamed to the device.

All contenders live in one process, over the same random weights in host memory, and take turns. What a contender keeps on the device
between turns is measured when it is built, so the peak of a turn can be stated for it alone. `copy_rate` is the rate of large copies from
page-locked memory, the physical limit of a decode whose weights live on the host.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.checkpoints import SHAPES, checkpoint, weight_files
from benchmarks.harness.disk import drop_cached_pages
from benchmarks.harness.statistics import ratio_of_medians, spread

__all__ = ["build_state", "copy_rate", "measure_disk", "measure_host", "skeleton"]

Builder = Callable[[], Any]
FAMILIES = {"accelerate": ("accelerate",), "diffusers": ("diffusers-block", "diffusers-leaf"), "resident": ("resident",)}


def measure_host(*, shape: str = "llama-8B", rounds: int = 3, share: float = 0.3, prefill: tuple[int, int] = (4, 2048)) -> dict[str, Any]:
    """Weights on the host: ours against resident, accelerate `cpu_offload` and diffusers group offloading with a stream.

    Args:
        shape: name in `SHAPES`.
        rounds: alternating rounds.
        share: fraction of the weights that ours may hold on the device.
        prefill: batch and tokens of the prefill.
    """
    state = build_state(shape)
    budget = int(SHAPES[shape].nbytes() * share)

    def ours() -> Any:
        import torchwrap

        return torchwrap.offload(skeleton(shape, state), device="cuda", device_memory=budget, params="host")

    builders: dict[str, Builder] = {
        "torchwrap": ours,
        "resident": lambda: skeleton(shape, state).to("cuda"),
        "accelerate": lambda: _accelerate(shape, state),
        "diffusers-block": lambda: _diffusers_block(shape, state),
        "diffusers-leaf": lambda: _diffusers_leaf(shape, state),
    }
    summary = _alternate(f"offload-cuda[{shape} host]", builders, rounds=rounds, prefill=prefill, vocabulary=SHAPES[shape].vocabulary)
    rate = copy_rate()
    mine, resident = summary["contenders"]["torchwrap"], summary["contenders"]["resident"]
    summary["copy_bytes_per_s"] = rate
    summary["streamed_bytes"] = mine.get("streamed_bytes")
    if summary["streamed_bytes"]:
        summary["fraction_of_copy_bandwidth"] = summary["streamed_bytes"] / rate / mine["decode_s"]["median"]
    summary["prefill_slowdown_over_resident"] = mine["prefill_s"]["median"] / resident["prefill_s"]["median"]
    summary["peak_saving"] = 1 - mine["peak_device_bytes"] / resident["peak_device_bytes"]
    return summary


def measure_disk(
    work: Path, *, shape: str = "llama-2.7GB", rounds: int = 3, device_memory: int = 900 << 20, host_memory: int = 300 << 20
) -> dict[str, Any]:
    """Weights on disk: ours against accelerate `disk_offload`, both computing on the card."""
    from benchmarks.harness.contenders import prepare

    folder = checkpoint(shape)
    prepare("accelerate-disk", folder, work)
    files = [*weight_files(folder), *weight_files(work)]

    def ours() -> Any:
        import torchwrap

        return torchwrap.offload.from_pretrained(folder, device="cuda", device_memory=device_memory, host_memory=host_memory, params="disk")

    def accelerate() -> Any:
        from accelerate import disk_offload

        return disk_offload(skeleton(shape).eval(), work, execution_device=torch.device("cuda"))

    builders: dict[str, Builder] = {"torchwrap": ours, "accelerate": accelerate}
    return _alternate(
        f"offload-cuda[{shape} disk]",
        builders,
        rounds=rounds,
        prefill=(1, 128),
        vocabulary=SHAPES[shape].vocabulary,
        before=lambda: drop_cached_pages(files),
    )


def build_state(shape: str) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights in host memory, by parameter name.

    One random block is cut at a different place for each tensor: only speed matters here, and 16 GB are then made in seconds.
    """
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    state = {}
    for index, (name, size) in enumerate(SHAPES[shape].tensors()):
        tensor = torch.ones(size, dtype=torch.bfloat16)
        if len(size) > 1:
            flat = tensor.view(-1)
            shifted = block.roll(7919 * index)
            for start in range(0, flat.numel(), block.numel()):
                piece = flat[start : start + block.numel()]
                piece.copy_(shifted[: piece.numel()])
        state[name] = tensor
    return state


def skeleton(shape: str, state: dict[str, torch.Tensor] | None = None) -> Any:
    """The model of `shape` on meta, or over the tensors of `state` without copying them."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in SHAPES[shape].configuration().items() if key not in ("architectures", "model_type")}
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.tie_weights()
    if state is not None:
        model.load_state_dict(state, assign=True, strict=not SHAPES[shape].tied)
        model.tie_weights()
    return model.eval()


def copy_rate(nbytes: int = 1 << 29, repeats: int = 5) -> float:
    """Best rate of a copy from page-locked host memory to the device, in bytes per second."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return nbytes / min(seconds)


def _alternate(
    title: str,
    builders: dict[str, Builder],
    *,
    rounds: int,
    prefill: tuple[int, int],
    vocabulary: int,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    models, resting, failed = {}, {}, {}
    for name, builder in builders.items():
        held = _allocated()
        try:
            models[name] = builder()
        except Exception as error:  # a rival that cannot run here is a result to record; our own failure is raised
            if name in ("torchwrap", "resident"):
                raise
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        resting[name] = _allocated() - held
    generator = torch.Generator().manual_seed(7)
    long = torch.randint(3, vocabulary, prefill, generator=generator).to("cuda")
    short = torch.randint(3, vocabulary, (1, 128), generator=generator).to("cuda")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    names = list(models)
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            before()
            record = _turn(models[name], long, short)
            record["peak_device_bytes"] -= sum(resting.values()) - resting[name]
            # The first round is warm-up: kernels are chosen, schedules recorded, caches of allocators filled.
            if index:
                runs[name].append(record)
    summary = _summary(title, runs, failed)
    summary["contenders"]["torchwrap"]["streamed_bytes"] = _streamed(models["torchwrap"])
    return summary


@torch.inference_mode()
def _turn(model: Any, long: torch.Tensor, short: torch.Tensor, tokens: int = 8) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prefill_s, output = _timed(lambda: model(input_ids=long, use_cache=True, logits_to_keep=1))
    del output
    _, output = _timed(lambda: model(input_ids=short, use_cache=True, logits_to_keep=1))
    ids, decode_s = [], []
    for _ in range(tokens):
        chosen = output.logits[:, -1].argmax(-1, keepdim=True)
        ids.append(int(chosen))
        cache = output.past_key_values
        elapsed, output = _timed(lambda chosen=chosen, cache=cache: model(input_ids=chosen, past_key_values=cache, logits_to_keep=1))
        decode_s.append(elapsed)
    return {
        "prefill_s": prefill_s,
        "decode_s": median(decode_s),
        "ids": ids,
        "logit_sum": float(output.logits.double().sum()),
        "peak_device_bytes": torch.cuda.max_memory_allocated(),
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    output = call()
    torch.cuda.synchronize()
    return time.perf_counter() - started, output


def _summary(title: str, runs: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> dict[str, Any]:
    summary: dict[str, Any] = {"title": title, "failed": failed, "contenders": {}}
    for name, records in runs.items():
        summary["contenders"][name] = {
            "prefill_s": spread([record["prefill_s"] for record in records]),
            "decode_s": spread([record["decode_s"] for record in records]),
            "peak_device_bytes": max(record["peak_device_bytes"] for record in records),
        }
    summary["equal_tokens"] = len({tuple(record["ids"]) for records in runs.values() for record in records}) == 1
    summary["equal_logits"] = len({record["logit_sum"] for records in runs.values() for record in records}) == 1
    mine = runs["torchwrap"]
    for phase in ("decode", "prefill"):
        own = [record[f"{phase}_s"] for record in mine]
        ratios = {
            name: ratio_of_medians([record[f"{phase}_s"] for record in records], own)
            for name, records in runs.items()
            if name != "torchwrap"
        }
        for family, members in FAMILIES.items():
            present = [ratios[member] for member in members if member in ratios]
            if present:
                ratios[family] = min(present)
        summary[f"{phase}_ratio"] = ratios
    return summary


def _accelerate(shape: str, state: dict[str, torch.Tensor]) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(skeleton(shape, state), execution_device=torch.device("cuda"), state_dict=state)


def _diffusers_block(shape: str, state: dict[str, torch.Tensor]) -> Any:
    from diffusers.hooks import apply_group_offloading

    model = skeleton(shape, state)
    # Blocks are found among the direct children only, so the hooks go on the inner model; the head stays on the card, in its favour.
    apply_group_offloading(
        model.model,
        onload_device=torch.device("cuda"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        non_blocking=True,
    )
    model.lm_head.to("cuda")
    return model


def _diffusers_leaf(shape: str, state: dict[str, torch.Tensor]) -> Any:
    from diffusers.hooks import apply_group_offloading

    model = skeleton(shape, state)
    apply_group_offloading(model, onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True, non_blocking=True)
    return model


def _streamed(model: Any) -> int | None:
    import torchwrap

    return getattr(torchwrap.handle_of(model, "offload").predict(batch=1, tokens=128), "streamed_bytes", None)


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
