"""The contenders of the training benchmark, each run in a fresh process: `python -m benchmarks.harness.trainers NAME FOLDER`.

All train the same float32 Llama with fused AdamW on the same token ids, recomputing blocks in backward. One loop times the steps and
records the losses, whose bits must be equal before any time counts: a step that moved a weight by one bit too many shows in the next loss.

- `torchwrap`: `offload` and `OffloadedOptimizer`, updates during backward; `torchwrap-serial`: the same with `overlap=False`.
- `memory`: plain PyTorch with everything in memory; without a limit it is the floor.
- `paging`: plain PyTorch with weights, gradients and both moments in files mapped shared, so that the kernel pages them; this is what one
  gets without any library. Gradients are put into their file as soon as each is complete, which is faster than keeping them there (every
  step would fill the file with zeros first).
- `deepspeed`: ZeRO-Infinity with everything on the disk, where it is installed; its losses are only near, see zero_infinity.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cgroup import report
from benchmarks.harness.contenders import declare_torchvision_operators

__all__ = ["LEARNING_RATE", "OURS", "TRAINERS", "main"]

LEARNING_RATE = 1e-4
OURS = ("torchwrap", "torchwrap-serial")


@dataclass(slots=True)
class Trainer:
    """A model in training mode, its optimizer, and what it says about itself when training is over."""

    model: Any
    optimizer: Any
    figures: Callable[[], dict[str, Any]] = field(default=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of one measured run; reports JSON to the parent."""
    parser = argparse.ArgumentParser(description="Run one contender of the training benchmark.")
    parser.add_argument("name", choices=sorted(TRAINERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the contender's own files, empty at the start")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON passed to the contender")
    given = parser.parse_args(arguments)
    declare_torchvision_operators()
    started = time.perf_counter()
    trainer = TRAINERS[given.name](given.folder, given.work, {"tokens": given.tokens, **given.options})
    load_s = time.perf_counter() - started
    measured = _train(trainer, given.tokens, given.steps)
    report({"name": given.name, "load_s": load_s, "threads": torch.get_num_threads(), **measured, **trainer.figures()})


def _train(trainer: Trainer, tokens: int, steps: int) -> dict[str, Any]:
    model, optimizer = trainer.model, trainer.optimizer
    generator = torch.Generator().manual_seed(7)
    losses, step_s, moved = [], [], []
    for _ in range(steps):
        ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator)
        before, started = _storage_bytes(), time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        step_s.append(time.perf_counter() - started)
        losses.append(loss.item().hex())
        moved.append([after - at for after, at in zip(_storage_bytes(), before, strict=True)])
    return {"step_s": step_s, "losses": losses, "bytes_read": [m[0] for m in moved], "bytes_written": [m[1] for m in moved]}


def _storage_bytes() -> tuple[int, int]:
    """(read, written) by this process so far, as the kernel counts what goes to and comes from disks; dirtied pages count as written."""
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["read_bytes"]), int(counted["write_bytes"])


def _mapped(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _memory(folder: Path, work: Path, options: dict[str, Any]) -> Trainer:
    model = _mapped(folder)
    for parameter in model.parameters():
        parameter.data = _like(parameter, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)).copy_(parameter.data)
    return Trainer(model, _adamw(model))


def _paging(folder: Path, work: Path, options: dict[str, Any]) -> Trainer:
    model = _mapped(folder)
    work.mkdir(parents=True, exist_ok=True)
    parameters = list(model.parameters())

    def mapped(name: str) -> list[torch.Tensor]:
        """One file, with room for every parameter."""
        path, end = work / f"{name}.bin", 0
        sizes = [-(-parameter.nbytes // 4096) * 4096 + 4096 for parameter in parameters]
        memory = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.uint8)
        made = []
        for parameter, size in zip(parameters, sizes, strict=True):
            made.append(_like(parameter, lambda nbytes, at=end: memory[at : at + nbytes]))  # type: ignore[misc]
            end += size
        return made

    optimizer = _adamw(model)
    for parameter, weight, gradient, first, second in zip(
        parameters, *map(mapped, ("weights", "gradients", "first-moments", "second-moments")), strict=True
    ):
        parameter.data = weight.copy_(parameter.data)
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), "exp_avg": first, "exp_avg_sq": second}

        def put_away(parameter: torch.Tensor, gradient: torch.Tensor = gradient) -> None:
            parameter.grad = gradient.copy_(parameter.grad)  # type: ignore[arg-type]

        parameter.register_post_accumulate_grad_hook(put_away)
    return Trainer(model, optimizer)


def _like(parameter: torch.Tensor, room: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """A tensor of the parameter's shape whose address has the same remainder modulo 64: matrix products give other last bits otherwise."""
    memory = room(parameter.nbytes + 64)
    start = (parameter.data_ptr() - memory.data_ptr()) % 64
    return memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)


def _torchwrap(folder: Path, work: Path, options: dict[str, Any], *, overlap: bool = True) -> Trainer:
    import torchwrap

    work.mkdir(parents=True, exist_ok=True)
    model = torchwrap.offload.from_pretrained(folder, **options.get("offload", {})).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torchwrap.OffloadedOptimizer(
        model,
        torch.optim.AdamW,
        lr=LEARNING_RATE,
        fused=True,
        overlap=overlap,
        path=work,
        durability="none",
        **options.get("optimizer", {}),
    )
    handle = torchwrap.handle_of(model, "offload")

    def figures() -> dict[str, Any]:
        promised = handle.predict_training(batch=1, tokens=options["tokens"])
        stats = {**handle.stats(), "optimizer": optimizer.stats()}
        return {"stats": stats, "prediction": promised.to_dict(), "explain": handle.explain()}

    return Trainer(model, optimizer, figures)


def _torchwrap_serial(folder: Path, work: Path, options: dict[str, Any]) -> Trainer:
    return _torchwrap(folder, work, options, overlap=False)


def _deepspeed(folder: Path, work: Path, options: dict[str, Any]) -> Trainer:
    from benchmarks.harness.zero_infinity import engine

    both = engine(folder, work, learning_rate=LEARNING_RATE, options=options.get("deepspeed", {}))
    return Trainer(both, both, both.figures)


TRAINERS: dict[str, Callable[[Path, Path, dict[str, Any]], Trainer]] = {
    "torchwrap": _torchwrap,
    "torchwrap-serial": _torchwrap_serial,
    "memory": _memory,
    "paging": _paging,
    "deepspeed": _deepspeed,
}


if __name__ == "__main__":
    sys.exit(main())
