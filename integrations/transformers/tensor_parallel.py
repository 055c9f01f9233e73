"""Output projections of models that transformers divides over processes: their sum runs beside attention, in blocks of rows.

Under a `tp_plan` each process has some heads and the columns of the output projection that belong to them (style "rowwise"), and
transformers sums the projections of all processes when they are complete. Found here by the function that it put on the module
(transformers 5.23, `TensorParallelLayer.install_forward`), which holds the style and the mesh; it stays where it is and is passed over in
calls that arrive with attention that is not computed yet (`Deferred`). q, k and v projections and the MLP keep transformers' own way.
Held by tests/integrations/test_tensor_parallel.py, which fails if the names change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from torchwrap.attention.distributed.deferred import Deferred
from torchwrap.attention.distributed.tiled import Tiling
from torchwrap.attention.distributed.works import resolved
from torchwrap.attention.service import Service
from torchwrap.core.errors import ConfigError, UnsupportedModelError
from torchwrap.core.layer import Layer
from torchwrap.core.swap import layers_of, original_class

__all__ = ["Projection", "ProjectionLayer", "find", "projections"]

_INSTALLED = "TensorParallelLayer.install_forward.<locals>.tp_forward"


@dataclass(frozen=True)
class Projection:
    """A row-wise parallel output projection.

    Attributes:
        name: in its attention module.
        module: the linear layer.
        group: name of the group over which it is summed.
    """

    name: str
    module: nn.Linear
    group: str


class ProjectionLayer(Layer):
    """Stands on an output projection; takes attention that is not computed yet and computes, projects and sums it in blocks."""

    where = "outside"

    def __init__(self, name: str, tiling: Tiling) -> None:
        self.attribute, self.tiling = name, tiling

    def takes(self, attention: nn.Module) -> bool:
        """Would what this attention module returns arrive here, with nothing in between that wants to see it?"""
        module = getattr(attention, self.attribute, None)
        if not isinstance(module, nn.Linear) or not any(layer is self for layer in layers_of(module)):
            return False  # an adapter took its place
        return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`[B, S, E]`, complete on every process, as the module's own code gives it."""
        if not args or not isinstance(args[0], Deferred):
            return call(*args, **kwargs)
        assert isinstance(module, nn.Linear)
        given, weight, bias = args[0], _local(module.weight), None if module.bias is None else _local(module.bias)
        rows = given.rows
        width = rows.q.shape[1] * rows.v.shape[3]
        if not given.is_computed and width == weight.shape[1]:
            count = self.tiling.count(rows, weight)
            if count > 1:
                return self.tiling.summed(rows, weight, bias, count)
        return call(given.compute(), *args[1:], **kwargs)


def projections(sites: list[tuple[str, nn.Module]], service: Service) -> dict[str, tuple[str, nn.Module, ProjectionLayer]]:
    """Places on the output projections that are summed over processes, by the name of their attention module.

    Args:
        sites: names and attention modules.
        service: its settings say whether, over which group, and in how many blocks.

    Raises:
        ConfigError: a group of the user's has other processes than the model's.
        UnsupportedModelError: there is such a group, and nothing to sum over it.
    """
    if service.allreduce_blocks == 1 or service.sequence is not None:
        return {}
    known: dict[str, Tiling] = {}
    places: dict[str, tuple[str, nn.Module, ProjectionLayer]] = {}
    for fqn, module in sites:
        projection = find(module)
        if projection is None:
            continue
        if service.tp_group is not None:
            _same_processes(service.tp_group, projection.group)
        group = service.tp_group or projection.group
        tiling = known.setdefault(group, Tiling(group, service.allreduce_blocks))
        places[fqn] = (f"{fqn}.{projection.name}", projection.module, ProjectionLayer(projection.name, tiling))
    if service.tp_group is not None and not places:
        raise UnsupportedModelError(
            "there is a tp_group, and no attention module has an output projection that is summed over processes",
            where="FastAttention.tp_group",
            fix='Load the model with from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto")), or leave tp_group out.',
        )
    return places


def find(attention: nn.Module) -> Projection | None:
    """The output projection of an attention module, if transformers sums it over processes; None if there is not exactly one."""
    found = [one for name, child in attention.named_children() if (one := _projection(name, child)) is not None]
    return found[0] if len(found) == 1 else None


def _projection(name: str, module: nn.Module) -> Projection | None:
    installed: Any = module.__dict__.get("forward")
    if getattr(installed, "__qualname__", None) != _INSTALLED or original_class(module) is not nn.Linear:
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from transformers.distributed.tensor_parallel import RowwiseParallel

    held = dict(zip(installed.__code__.co_freevars, (cell.cell_contents for cell in installed.__closure__), strict=True))
    style, mesh = held["self"], held["mesh"]
    weight = module.weight
    if not isinstance(style, RowwiseParallel) or not isinstance(weight, DTensor) or mesh.ndim != 1:
        return None
    usual = (style.input_layouts, style.output_layouts, style.use_local_output) == (Shard(-1), Replicate(), True)
    if not usual or tuple(weight.placements) != (Shard(1),):
        return None
    assert isinstance(module, nn.Linear)
    return Projection(name, module, mesh.get_group().group_name)


def _same_processes(given: str, own: str) -> None:
    """Check that a group of the user's has the processes that the model is divided over.

    Raises:
        ConfigError: it has others.
    """
    theirs, ours = (dist.get_process_group_ranks(resolved(name)) for name in (given, own))
    if sorted(theirs) != sorted(ours):
        raise ConfigError(
            f"the group has the processes {theirs}, and the model is divided over {ours}",
            where="FastAttention.tp_group",
            fix="Leave tp_group out: the model knows its own group.",
        )


def _local(parameter: Tensor) -> Tensor:
    """This process' part of a parameter; its gradient becomes one of the whole."""
    local: Callable[[], Tensor] | None = getattr(parameter, "to_local", None)
    return parameter if local is None else local()
