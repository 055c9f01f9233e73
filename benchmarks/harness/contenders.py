"""The contenders of the memory-limit benchmark, each run in a fresh process: `python -m benchmarks.harness.contenders NAME FOLDER`.

Every contender turns a checkpoint folder into something callable like a transformers model; one loop then times a prefill and a
greedy decode and records what is needed to prove that all computed the same. Work that a user does once (converting weights to
a private format) happens in `prepare`, before and outside the measured run, without a memory limit.

What each rival is given, chosen as the fastest form its interface allows (benchmarks/README.md has the figures of the others):

- `mmap`: plain `from_pretrained`. safetensors maps the files and the kernel pages weights in and out.
- `accelerate-disk`: `disk_offload` on a model built on meta, weights in its own `.dat` format. Its best case: the mapped file is
  copied once per tensor, where the safetensors path opens the file again for every tensor.
- `accelerate-map`: `device_map="auto"` with a host budget, the rest on disk, as transformers offers it.
- `airllm`: AirLLM 4.0 on `device="cpu"` with prefetching. It insists on a tokenizer in the folder, which generated checkpoints do
  not have; `_airllm` overrides that one method and nothing else.
- `memory`: everything read into memory; run without a limit it is the floor of the computation.
- `torchwrap`: `offload.from_pretrained(folder)`, budget found by itself; `torchwrap-explicit` says host_memory=.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cgroup import report

__all__ = ["CONTENDERS", "OURS", "declare_torchvision_operators", "main", "prepare"]

Loader = Callable[[Path, Path, dict[str, Any]], Any]
OURS = ("torchwrap", "torchwrap-explicit")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of one measured run (or of one preparation, with --prepare); reports JSON to the parent."""
    parser = argparse.ArgumentParser(description="Run one contender of the memory-limit benchmark.")
    parser.add_argument("name", choices=sorted(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the contender's own converted weights")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=6, help="tokens to decode after the prefill")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON passed to the contender")
    parser.add_argument("--prepare", action="store_true")
    given = parser.parse_args(arguments)
    declare_torchvision_operators()
    if given.prepare:
        prepare(given.name, given.folder, given.work)
        return
    started = time.perf_counter()
    model = CONTENDERS[given.name](given.folder, given.work, given.options)
    load_s = time.perf_counter() - started
    measured = _measure(model, _prompt(model.config.vocab_size, given.prompt), given.tokens)
    report({"name": given.name, "load_s": load_s, "threads": torch.get_num_threads(), **measured, **_own_figures(model, given)})


def prepare(name: str, folder: Path, work: Path) -> None:
    """Convert `folder` to the contender's own format below `work`, once; a no-op for contenders without one."""
    marker = work / "prepared"
    if name not in _PREPARE or marker.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    _PREPARE[name](folder, work)
    marker.touch()


@torch.inference_mode()
def _measure(model: Any, prompt: torch.Tensor, tokens: int) -> dict[str, Any]:
    digest = hashlib.sha256()

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any, float]:
        started = time.perf_counter()
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = output.logits[:, -1].argmax(-1, keepdim=True)
        elapsed = time.perf_counter() - started
        digest.update(output.logits[:, -1].contiguous().view(torch.uint8).numpy().tobytes())
        sums.append(float(output.logits[:, -1].double().sum()))
        return chosen, output.past_key_values, elapsed

    sums: list[float] = []
    chosen, cache, prefill_s = step(prompt, None)
    ids, decode_s = [int(chosen)], []
    for _ in range(tokens):
        chosen, cache, elapsed = step(chosen, cache)
        ids.append(int(chosen))
        decode_s.append(elapsed)
    return {"prefill_s": prefill_s, "decode_s": decode_s, "ids": ids, "logit_sum": sum(sums), "logit_sha256": digest.hexdigest()}


def _prompt(vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(7))


def _mmap(folder: Path, work: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _memory(folder: Path, work: Path, options: dict[str, Any]) -> Any:
    model = _mmap(folder, work, options)
    # Tied tensors are one object in `parameters()`, so the tie survives the copy.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _accelerate_disk(folder: Path, work: Path, options: dict[str, Any]) -> Any:
    from accelerate import disk_offload, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return disk_offload(model.eval(), work, execution_device=torch.device("cpu"), preload_module_classes=options.get("preload"))


def _prepare_accelerate(folder: Path, work: Path) -> None:
    from accelerate.utils.offload import offload_weight, save_offload_index
    from safetensors import safe_open

    index: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118  safe_open is not a mapping
                offload_weight(reader.get_tensor(name), name, work, index)
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        # accelerate looks every name up, tied or not; a second file would double the reading of the tied weight.
        index["lm_head.weight"] = index["model.embed_tokens.weight"]
        (work / "lm_head.weight.dat").symlink_to("model.embed_tokens.weight.dat")
    save_offload_index(index, work)


def _accelerate_map(folder: Path, work: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    budget = options.get("max_memory", "500MiB")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", max_memory={"cpu": budget}, offload_folder=work / "map"
    ).eval()


def _airllm(folder: Path, work: Path, options: dict[str, Any]) -> Any:
    from airllm import AirLLMBaseModel

    class WithoutTokenizer(AirLLMBaseModel):
        def get_tokenizer(self, hf_token: str | None = None) -> None:
            return None

    return WithoutTokenizer(str(folder), device="cpu", layer_shards_saving_path=str(work), prefetching=options.get("prefetching", True))


def _prepare_airllm(folder: Path, work: Path) -> None:
    _airllm(folder, work, {})


def _torchwrap(folder: Path, work: Path, options: dict[str, Any]) -> Any:
    import torchwrap

    return torchwrap.offload.from_pretrained(folder, **options)


def _own_figures(model: Any, given: argparse.Namespace) -> dict[str, Any]:
    """What our handle says about itself, for the comparison of promise and measurement."""
    if given.name not in OURS:
        return {}
    import torchwrap

    handle = torchwrap.handle_of(model, "offload")
    prediction = handle.predict(batch=1, tokens=given.prompt + given.tokens)
    stats = {key: value for key, value in dict(handle.stats()).items() if isinstance(value, (int, float, str))}
    names = ("peak_process", "device_bytes", "host_bytes", "disk_bytes", "streamed_bytes", "seconds_per_pass", "bottleneck")
    return {"stats": stats, "prediction": {name: getattr(prediction, name, None) for name in names}, "explain": handle.explain()}


def declare_torchvision_operators() -> None:
    """Make transformers importable beside a CPU build of torch, as the tests do; nothing where `tests/` is not at hand."""
    try:
        from tests import torchvision_ops
    except ImportError:
        return
    torchvision_ops.ensure()


CONTENDERS: dict[str, Loader] = {
    "mmap": _mmap,
    "memory": _memory,
    "accelerate-disk": _accelerate_disk,
    "accelerate-map": _accelerate_map,
    "airllm": _airllm,
    "torchwrap": _torchwrap,
    "torchwrap-explicit": _torchwrap,
}

_PREPARE: dict[str, Callable[[Path, Path], None]] = {"accelerate-disk": _prepare_accelerate, "airllm": _prepare_airllm}


if __name__ == "__main__":
    sys.exit(main())
