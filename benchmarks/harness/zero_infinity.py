"""DeepSpeed's ZeRO-Infinity as a contender of the training benchmark: stage 3, one process, weights and optimizer state on the disk.

Not part of any environment that a make target makes: it is built from source against the installed torch and lies beside the environment,
in the folder `deepspeed`, which only the processes of this contender see (benchmarks/README.md has the two commands). Its compiled
operators are built there by the first run, some minutes before anything is measured.

Its own Adam does not round as torch's does, so its losses are near the others' and not equal; the distance is reported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["FOLDER", "Engine", "build_operators", "configuration", "engine", "environment", "missing"]

FOLDER = Path(sys.prefix) / "deepspeed"


def missing() -> str | None:
    """Why DeepSpeed cannot be measured here; None when it can."""
    if not (FOLDER / "deepspeed").is_dir():
        return "DeepSpeed is not installed here (benchmarks/README.md says how)"
    return None


def environment() -> dict[str, str]:
    """Variables of a child process that may import DeepSpeed."""
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(FOLDER / "bin"), os.environ["PATH"]]),  # ninja
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "operators"),
    }


def build_operators() -> None:
    """Compile what DeepSpeed compiles at first use; not timed, and not under the limit: a compiler takes more.

    Raises:
        Exception: whatever its build says, most often that libaio's headers are missing.
    """
    for lock in (FOLDER / "operators").glob("*/lock"):
        lock.unlink()  # DeepSpeed 0.19.8: an interrupted build leaves it, and the next one waits for it for ever
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, CPUAdamBuilder, ShareMemCommBuilder

    for builder in (CPUAdamBuilder, AsyncIOBuilder, ShareMemCommBuilder):
        builder().load(verbose=False)


class Engine:
    """A DeepSpeed engine that the training loop can use as both model and optimizer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.config = engine.module.config  # `engine.config` is DeepSpeed's own

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward."""
        return self._engine(**inputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        self._engine.zero_grad()

    def step(self) -> None:
        """Update the weights."""
        self._engine.step()

    def figures(self) -> dict[str, Any]:
        """What a run says about itself: results/ cannot look a version up that is not installed in the environment."""
        return {"version": importlib.metadata.version("deepspeed")}


def engine(folder: Path, work: Path, *, learning_rate: float, options: dict[str, Any]) -> Engine:
    """The checkpoint's model, partitioned to the disk while it is built, and its engine."""
    import deepspeed
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = configuration(folder, work, learning_rate=learning_rate, options=options)
    rendezvous = work / "rendezvous"
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=rendezvous.as_uri(), rank=0, world_size=1)
    shape = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        # Before Init, which replaces torch.Tensor.__new__: torch._dynamo, that the model's file needs, cannot be imported then.
        made_of = type(AutoModelForCausalLM.from_config(shape))
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = made_of(shape)
    stored: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= dict.fromkeys(file.keys(), path)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), safe_open(stored[name], "pt") as file:
            parameter.data.copy_(file.get_tensor(name))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return Engine(wrapped)


def configuration(folder: Path, work: Path, *, learning_rate: float, options: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given: weights and state on the disk, buffers that just hold the largest weight.

    `pin_memory` and `pipeline` (reads and writes beside the update) are off: without a card there is nothing to copy to, and with
    the pipeline the same training took 7.1 instead of 3.8 GiB and moved further away from the others' losses.
    """
    shape = json.loads((folder / "config.json").read_text())
    largest = max(shape["vocab_size"], shape["intermediate_size"]) * shape["hidden_size"]
    pipeline = options.get("pipeline", False)
    place = {"device": "nvme", "nvme_path": str(work), "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 0.19.8 clips at norm 1 when not told
        "optimizer": {"type": "AdamW", "params": {"lr": learning_rate, "weight_decay": 0.01}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {**place, "buffer_size": largest, "buffer_count": 4, "max_in_cpu": 0},
            # With the pipeline, buffers of three groups of weights are in use at the same time.
            "offload_optimizer": {**place, "buffer_count": 12 if pipeline else 5, "pipeline_read": pipeline, "pipeline_write": pipeline},
            "sub_group_size": largest,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": largest,
            "stage3_param_persistence_threshold": 8192,
            "reduce_bucket_size": largest,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 16, "thread_count": 1, "single_submit": False, "overlap_events": True},
    }


if __name__ == "__main__":
    build_operators()
