"""One measured run of `torchwrap bench`, in a process of its own: `python -m torchwrap.cli.contender JSON`.

Loads a causal language model one way, feeds it a fixed pseudo-random prompt and decodes greedily, token by token. What it prints last is
one JSON object: seconds of loading, prefill and each token, the token ids with their logits, and a digest of all logits, so that the parent
can tell whether every contender computed the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["CONTENDERS", "Options", "main"]

Options = dict[str, Any]


def main() -> int:
    """Run the contender that the JSON argument describes."""
    options: Options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    _forget_cached_pages(folder)
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="torchwrap-bench-", dir=options.get("path"))))
        started = time.perf_counter()
        model = CONTENDERS[options["name"]](folder, work, options)
        loaded = time.perf_counter() - started
        measured = _measure(model, options["prompt"], options["tokens"])
    print(json.dumps({"name": options["name"], "load_s": loaded, "hwm_bytes": _high_water_mark(), **measured}))
    return 0


def _measure(model: Any, prompt: int, tokens: int) -> dict[str, object]:
    import torch

    digest, ids, best, seconds = hashlib.sha256(), [], [], []
    generator = torch.Generator().manual_seed(7)
    step = torch.randint(3, model.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    cache = None
    with torch.inference_mode():
        for _ in range(tokens + 1):
            started = time.perf_counter()
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = output.logits[:, -1], output.past_key_values
            step = logits.argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - started)
            ids.append(int(step))
            best.append(float(logits.max()))
            digest.update(logits.float().cpu().numpy().tobytes())
    return {"prefill_s": seconds[0], "decode_s": seconds[1:], "ids": ids, "best_logits": best, "logits_sha256": digest.hexdigest()}


def _forget_cached_pages(folder: Path) -> None:
    """Every contender starts from the disk, not from pages that the one before left in the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _high_water_mark() -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _offload(folder: Path, work: Path, options: Options) -> Any:
    import torchwrap

    # No path: the model's own files are read in place, nothing is written.
    return torchwrap.offload.from_pretrained(folder, **options.get("budget", {}))


def _mmap(folder: Path, work: Path, options: Options) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _memory(folder: Path, work: Path, options: Options) -> Any:
    import torch

    model = _mmap(folder, work, options)
    # A converting `to` copies out of the mapped file; tied parameters stay one object.
    dtype = model.dtype
    return model.to(torch.float64 if dtype == torch.float32 else torch.float32).to(dtype)


def _accelerate(folder: Path, work: Path, options: Options) -> Any:
    from accelerate import disk_offload

    return disk_offload(_mmap(folder, work, options), str(work))


CONTENDERS: dict[str, Callable[[Path, Path, Options], Any]] = {
    "offload": _offload,
    "mmap": _mmap,
    "memory": _memory,
    "accelerate": _accelerate,
}


if __name__ == "__main__":
    sys.exit(main())
