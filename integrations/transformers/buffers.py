"""Real buffers for a model that was built on `meta`.

Persistent buffers are stored with the weights and are read. The others (rotary frequencies, position ids, embedding scales) are not:
transformers 5 computes them after loading by running the model's own initialiser, which skips every tensor that carries the mark
`_is_hf_initialized`. The same is done here, so the values are the loader's own. Parameters that no file holds although the model says
that this is in order (`_keys_to_ignore_on_load_missing`, e.g. sinusoidal positions) go the same way and are then written out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

__all__ = ["fill_persistent_buffers", "initialise"]

MARK = "_is_hf_initialized"  # transformers 5.23, initialization.py: on a tensor "leave it", on a module "nothing left to do"


def fill_persistent_buffers(model: nn.Module, weights: dict[str, tuple[Path, str]]) -> None:
    """Read every buffer that `weights` locates into the model."""
    for name, _ in list(model.named_buffers(remove_duplicate=False)):
        if name in weights:
            file, key = weights[name]
            with safe_open(file, framework="pt") as handle:
                value = handle.get_tensor(key).clone()  # a copy: the view would keep the file mapped
            setattr(value, MARK, True)
            _owner(model, name)._buffers[_leaf(name)] = value


def initialise(model: Any, absent: set[str], work: os.PathLike[str]) -> dict[str, tuple[Path, str]]:
    """Compute the buffers still on `meta`, and the `absent` parameters, with the model's own initialiser.

    Returns:
        Where the parameters were written (they go back to `meta`); empty for almost every model.

    Cost: the bytes of those buffers and parameters. Draws random numbers if the initialiser does.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} & absent
    shared: dict[int, torch.Tensor] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.is_meta:
            value = shared.setdefault(id(buffer), torch.empty_like(buffer, device="cpu"))
            _owner(model, name)._buffers[_leaf(name)] = value
            setattr(_owner(model, name), MARK, False)
    for name in parameters:
        owner = _owner(model, name)
        owner._parameters[_leaf(name)] = nn.Parameter(torch.empty_like(model.get_parameter(name), device="cpu"))
        setattr(owner, MARK, False)
    model.initialize_weights()
    written: dict[str, tuple[Path, str]] = {}
    for name in sorted(parameters):
        value = model.get_parameter(name)
        entry = _write(name, value.detach().contiguous(), work)
        _owner(model, name)._parameters[_leaf(name)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        written[name] = entry
    return written


def _write(name: str, value: torch.Tensor, work: os.PathLike[str]) -> tuple[Path, str]:
    from transformers.integrations.accelerate import offload_weight

    index: dict[str, dict[str, str]] = {}
    offload_weight(value, name, os.fspath(work), index)
    return Path(index[name]["safetensors_file"]), index[name]["weight_name"]


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
