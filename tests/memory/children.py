"""What runs inside the limited or watched process: `python children.py FUNCTION ARGUMENT...` (conftest.py starts it).

Growth is measured in a process of its own, because a test runner's memory grows by itself.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torchwrap as tw
from benchmarks.harness.cgroup import report
from tests import torchvision_ops

torchvision_ops.ensure()

FORWARDS = 200
STEPS = 500
CYCLES = 200
WARM_UP = 40


def small_model(blocks: int = 8) -> Any:
    """Llama, blocks of 0.4 MB: large enough to stream, small enough for 200 passes in a second or two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def budget(model: Any) -> int:
    """Two fifths of the weights: most blocks have to be streamed."""
    return sum(parameter.nbytes for parameter in model.parameters()) * 2 // 5


def forwards(folder: str) -> dict[str, Any]:
    """Growth over 200 forwards of one offloaded model."""
    model = small_model()
    ids = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        expected = model(ids).logits
        tw.offload(model, device_memory=budget(model), params="disk", path=folder)
        streamed = int(tw.handle_of(model, "offload").predict(batch=1, tokens=8).streamed_bytes)
        equal = True

        def once() -> None:
            nonlocal equal
            equal = equal and torch.equal(model(ids).logits, expected)

        growth = watch(once, FORWARDS)
    tw.unwrap(model)
    return {**growth, "equal": equal, "streamed_bytes": streamed}


def cycles(folder: str) -> dict[str, Any]:
    """Growth over 200 times wrap, one forward, unwrap."""
    model = small_model(5)
    ids = torch.arange(8).unsqueeze(0)
    limit = budget(model)
    with torch.inference_mode():
        expected = model(ids).logits
        equal = True

        def once() -> None:
            nonlocal equal
            tw.offload(model, device_memory=limit, params="disk", path=folder)
            equal = equal and torch.equal(model(ids).logits, expected)
            tw.unwrap(model)

        growth = watch(once, CYCLES)
    return {**growth, "equal": equal and torch.equal(model(ids).logits, expected), "left_over": sorted(os.listdir(folder))}


def steps(folder: str) -> dict[str, Any]:
    """Growth over 500 training steps of one offloaded model."""
    model = small_model(3).train()
    ids = torch.arange(8).unsqueeze(0)
    tw.offload(model, device_memory="1600KiB", params="disk", path=folder)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-4, fused=True, path=Path(folder) / "run", chunk="64KiB")
    sizes, losses = [], []

    def once() -> None:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if optimizer.steps % 100 == WARM_UP:
            optimizer.commit()
            sizes.append(sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*") if file.is_file()))

    growth = watch(once, STEPS)
    streamed = int(tw.handle_of(model, "offload").plan.streamed_bytes)
    optimizer.close()
    tw.unwrap(model)
    return {**growth, "sizes": sizes, "first": losses[0], "last": losses[-1], "streamed_bytes": streamed}


def train(folder: str, count: str, *options: str) -> dict[str, Any]:
    """Open `folder` offloaded, with "checkpointing" by the model itself or ours, and train by AdamW; what was promised and what came."""
    work = Path(folder) / "run"
    own = "checkpointing" in options
    fields = dict(option.split("=", 1) for option in options if "=" in option)
    model = tw.offload.from_pretrained(Path(folder), goal="train", **fields).train()
    if own:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-4, fused=True, path=work, durability="none")
    handle = tw.handle_of(model, "offload")
    promised = handle.predict_training(batch=1, tokens=32)
    losses = _losses(model, optimizer, int(count))
    measured = handle.predict_training(batch=1, tokens=32)
    optimizer.close()
    return {"losses": losses, "promised": promised.to_dict(), "measured": measured.to_dict(), "streamed_bytes": handle.plan.streamed_bytes}


def refuse_optimizer(folder: str) -> dict[str, Any]:
    """An optimizer for a model wrapped for inference: the typed error, what was forecast, and whether the model still computes."""
    model = tw.offload.from_pretrained(Path(folder), activations="recompute").train()
    promised = tw.handle_of(model, "offload").predict_training(batch=1, tokens=32)
    ids = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        try:
            tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-4, path=Path(folder) / "refused")
        except tw.core.errors.BudgetError as error:
            same = torch.equal(model(input_ids=ids, use_cache=False).logits, before)
            left = sum(file.stat().st_size for file in (Path(folder) / "refused").rglob("*"))
            return {"error": str(error), "needed": error.needed, "promised": promised.peak_process, "same": same, "left": left}
    return {"error": None}


def train_window(folder: str, count: str, train: str) -> dict[str, Any]:
    """The same under `superpipeline` with what it chooses, blocks computed again; the knobs after each step."""
    asked = {"True": True, "None": None}[train]
    model = tw.superpipeline.from_pretrained(Path(folder), activations="recompute", max_slowdown=1.0, train=asked).train()
    work = Path(folder) / "run"
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-4, fused=True, path=work, durability="none")
    handle = tw.handle_of(model, "superpipeline")
    ks: list[int] = []
    losses = _losses(model, optimizer, int(count), lambda: ks.append(handle.knobs.k))
    prediction = handle.predict(batch=1, tokens=32)
    optimizer.close()
    return {"losses": losses, "ks": ks, "predicted": handle.baseline_bytes + prediction.peak_bytes, "explain": handle.explain()}


def train_plainly(folder: str, count: str) -> dict[str, Any]:
    """The same without torchwrap."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").train()
    return {"losses": _losses(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), int(count))}


def _losses(model: Any, optimizer: torch.optim.Optimizer, count: int, after: Callable[[], None] = lambda: None) -> list[str]:
    losses = []
    for number in range(count):
        ids = torch.arange(3 + number, 35 + number).unsqueeze(0)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
        after()
    return losses


def generate(folder: str, tokens: str, *options: str) -> dict[str, Any]:
    """Open `folder` offloaded, run a prefill and `tokens` greedy steps; what was promised and what came out."""
    model = tw.offload.from_pretrained(Path(folder), **dict(option.split("=", 1) for option in options))
    handle = tw.handle_of(model, "offload")
    prompt = torch.arange(3, 35).unsqueeze(0)
    promised = handle.predict(batch=1, tokens=prompt.shape[1] + int(tokens))
    with torch.inference_mode():
        chosen = model.generate(prompt, max_new_tokens=int(tokens), min_new_tokens=int(tokens), do_sample=False)
    return {
        "ids": chosen[0].tolist(),
        "peak_process": promised.peak_process,
        "streamed_bytes": promised.streamed_bytes,
        "explain": handle.explain(),
    }


def windowed(folder: str, tokens: str, *options: str) -> dict[str, Any]:
    """The same under `superpipeline`; what was promised before the first pass, and what the knobs then were."""
    fields: dict[str, Any] = {name: int(value) for name, value in (option.split("=", 1) for option in options)}
    model = tw.superpipeline.from_pretrained(Path(folder), **fields)
    handle = tw.handle_of(model, "superpipeline")
    prompt = torch.arange(3, 35).unsqueeze(0)
    promised = handle.baseline_bytes + handle.predict(batch=1, tokens=prompt.shape[1] + int(tokens)).peak_bytes
    with torch.inference_mode():
        chosen = model.generate(prompt, max_new_tokens=int(tokens), min_new_tokens=int(tokens), do_sample=False)
    return {"ids": chosen[0].tolist(), "peak_process": promised, "k": handle.knobs.k, "explain": handle.explain()}


def plain(folder: str, tokens: str) -> dict[str, Any]:
    """The same without torchwrap."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    prompt = torch.arange(3, 35).unsqueeze(0)
    with torch.inference_mode():
        chosen = model.generate(prompt, max_new_tokens=int(tokens), min_new_tokens=int(tokens), do_sample=False)
    return {"ids": chosen[0].tolist()}


def refuse(folder: str, host_memory: str) -> dict[str, Any]:
    """The typed error of a budget that cannot work, and whether anything was left behind."""
    try:
        tw.offload.from_pretrained(Path(folder), host_memory=int(host_memory))
    except tw.core.errors.BudgetError as error:
        return {"error": str(error), "memory_error": isinstance(error, MemoryError), "threads": threading.active_count()}
    return {"error": None}


def watch(action: Callable[[], None], count: int) -> dict[str, Any]:
    """Repeat `action` and fit resident bytes against repetitions, after a warm-up in which allocators settle."""
    for _ in range(WARM_UP):
        action()
    gc.collect()
    before = {"descriptors": descriptors(), "threads": threading.active_count(), "objects": len(gc.get_objects())}
    resident = []
    for _ in range(count):
        action()
        resident.append(resident_bytes())
    gc.collect()
    after = {"descriptors": descriptors(), "threads": threading.active_count(), "objects": len(gc.get_objects())}
    return {"slope_bytes_per_100": slope(resident) * 100, "before": before, "after": after}


def slope(values: list[int]) -> float:
    """Least-squares slope per step."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    above = sum((index - middle) * (value - mean) for index, value in enumerate(values))
    return above / sum((index - middle) ** 2 for index in range(len(values)))


def resident_bytes() -> int:
    """Resident set now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    report(globals()[sys.argv[1]](*sys.argv[2:]))
