"""Checkpoints for the benchmarks: known shapes, random weights, written shard by shard.

A benchmark of streaming needs files of real size and layout, not real text. Each shape is a transformers Llama configuration; its
weights are random bits shaped into bfloat16 numbers of standard deviation 0.019 (about what a trained model of this width has), made
at memory speed from a seeded generator. Only one shard is in memory at a time. Files are cached under `TORCHWRAP_BENCH`, or the user's
cache folder, and made again when the recipe changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

__all__ = ["SHAPES", "Shape", "cache_folder", "checkpoint", "weight_files", "write_checkpoint"]

RECIPE = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama shape and how its checkpoint is cut."""

    name: str
    hidden: int
    mlp: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    shards: int
    positions: int = 2048
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    def configuration(self) -> dict[str, object]:
        """Content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": self.dtype,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in model order."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index in range(self.blocks):
            prefix = f"model.layers.{index}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.mlp, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.mlp, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.mlp)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.itemsize * _count(shape) for _, shape in self.tensors())


SHAPES = {
    shape.name: shape
    for shape in (
        # The reference of the published figures: 2.70 GB, of which 2.43 GB in 20 blocks of 122 MB.
        Shape(name="llama-2.7GB", hidden=2048, mlp=8192, blocks=20, heads=32, kv_heads=8, vocabulary=32000, tied=False, shards=5),
        # The counter-check: head tied to a larger embedding, 32 blocks of 69 MB, 2.37 GB, one file per 0.8 GB.
        Shape(name="llama-thin-tied", hidden=1536, mlp=6144, blocks=32, heads=24, kv_heads=8, vocabulary=49152, tied=True, shards=3),
        # SmolLM2-135M's shape, for the case where everything fits.
        Shape(name="llama-135M", hidden=576, mlp=1536, blocks=30, heads=9, kv_heads=3, vocabulary=49152, tied=True, shards=1),
        # For the tests: 0.86 GB in 24 blocks of 35 MB.
        Shape(name="llama-0.9GB", hidden=1024, mlp=4864, blocks=24, heads=16, kv_heads=4, vocabulary=8192, tied=True, shards=3),
        # For training: 352 M parameters in float32, of which 340 M in 12 blocks of 113 MB.
        Shape(
            name="llama-352M-fp32",
            hidden=1536,
            mlp=4096,
            blocks=12,
            heads=12,
            kv_heads=12,
            vocabulary=8192,
            tied=True,
            shards=1,
            dtype="float32",
        ),
        # For one CUDA card with 80 GB: 16.1 GB in 32 blocks of 436 MB; built in memory, never written.
        Shape(name="llama-8B", hidden=4096, mlp=14336, blocks=32, heads=32, kv_heads=8, vocabulary=128256, tied=False, shards=8),
    )
}


def cache_folder() -> Path:
    """Folder for checkpoints: `TORCHWRAP_BENCH`, or `torchwrap/bench` in the user's cache folder."""
    named = os.environ.get("TORCHWRAP_BENCH")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torchwrap" / "bench"


def checkpoint(name: str, *, folder: Path | None = None) -> Path:
    """Folder of the checkpoint of shape `name`, written when it is not there yet.

    Cost: `SHAPES[name].nbytes()` of disk, a fifth of that in memory while writing.
    """
    shape = SHAPES[name]
    recipe = {key: value for key, value in asdict(shape).items() if (key, value) != ("dtype", "bfloat16")}
    digest = hashlib.sha256(json.dumps([RECIPE, recipe], sort_keys=True).encode()).hexdigest()[:12]
    target = (folder or cache_folder()) / f"{name}-{digest}"
    if not (target / "config.json").exists():
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(shape, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return target


def write_checkpoint(shape: Shape, folder: Path, *, seed: int = 0) -> None:
    """Write config.json, the shards and their index into `folder`."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < shape.nbytes() * 1.1:
        raise OSError(f"{folder}: {shape.nbytes():,} bytes are needed, {free:,} are free; set TORCHWRAP_BENCH to a larger disk")
    folder.mkdir(parents=True, exist_ok=True)
    generator, dtype = numpy.random.default_rng(seed), getattr(torch, shape.dtype)
    groups = _cut(shape)
    weight_map = {}
    for index, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: _random(generator, name, size).to(dtype) for name, size in group}, folder / file, metadata={"format": "pt"})
        weight_map.update({name: file for name, _ in group})
        with (folder / file).open("rb") as written:
            # Dirty pages cannot be dropped from the page cache, and would later be charged to whoever runs first.
            os.fsync(written.fileno())
    if len(groups) > 1:
        index_text = json.dumps({"metadata": {"total_size": shape.nbytes()}, "weight_map": weight_map}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index_text)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}))
    (folder / "config.json").write_text(json.dumps(shape.configuration(), indent=1))


def weight_files(folder: Path) -> list[Path]:
    """All files below `folder` that hold weights, largest first."""
    files = [path for path in folder.rglob("*") if path.suffix in {".safetensors", ".dat", ".bin"} and path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def _cut(shape: Shape) -> list[list[tuple[str, tuple[int, ...]]]]:
    share = shape.nbytes() / shape.shards
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    written = 0
    for name, size in shape.tensors():
        if groups[-1] and len(groups) < shape.shards and written >= share * len(groups):
            groups.append([])
        groups[-1].append((name, size))
        written += shape.itemsize * _count(size)
    return groups


def _random(generator: numpy.random.Generator, name: str, size: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    bits = numpy.frombuffer(bytearray(generator.bytes(2 * _count(size))), dtype=numpy.uint16)
    # bfloat16 is sign, 8 exponent bits, 7 mantissa bits. Sign, mantissa and the lowest exponent bit stay random; the exponent is
    # 120 or 121, so magnitudes lie in [2**-7, 2**-5) and the standard deviation is 0.019.
    numpy.bitwise_and(bits, 0b1000_0000_1111_1111, out=bits)
    numpy.bitwise_or(bits, 120 << 7, out=bits)
    return torch.from_numpy(bits.view(numpy.int16)).view(torch.bfloat16).reshape(size)


def _count(size: tuple[int, ...]) -> int:
    total = 1
    for length in size:
        total *= length
    return total


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
