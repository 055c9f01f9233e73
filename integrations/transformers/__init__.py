"""torchwrap's knowledge of Hugging Face transformers: blocks, tied weights, checkpoints, memory of a forward.

`integration` is the object that the core asks. Importing this package imports no transformers: each method loads its part when it is
called, and whether a model or a folder belongs here is decided by class names and by config.json. Tested versions: README.md.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from torchwrap.core.integration import AttentionRoute, BlockRef, ExpertsRef, Integration, LoadingState, Skeleton

if TYPE_CHECKING:
    import torch

__all__ = ["TransformersIntegration", "integration"]


class TransformersIntegration(Integration):
    """Answers the core's questions about transformers models; see `torchwrap.core.Integration` for each method."""

    name = "transformers"
    tested: ClassVar[dict[str, tuple[str, str]]] = {"transformers": ("5.23", "5.23")}

    def matches(self, model: nn.Module) -> bool:
        """True if the model derives from transformers' `PreTrainedModel`; a block taken out of one is an ordinary module."""
        return any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in type(model).__mro__)

    def blocks(self, model: nn.Module) -> list[BlockRef] | None:
        """Repeated layers in the order of their first calls; see `families.blocks`."""
        from torchwrap.integrations.transformers import families

        return families.blocks(model)

    def tied(self, model: nn.Module) -> list[list[str]]:
        """Groups of parameter names that are one tensor; see `families.tied`."""
        from torchwrap.integrations.transformers import families

        return families.tied(model)

    def no_split(self, model: nn.Module) -> tuple[str, ...]:
        """Class names that the model asks to keep on one device."""
        from torchwrap.integrations.transformers import families

        return families.no_split(model)

    def gather_only(self, model: nn.Module) -> tuple[type[nn.Embedding], ...]:
        """Exact embedding classes that look up rows and at most scale them; see `families.gather_only`."""
        from torchwrap.integrations.transformers import families

        return families.gather_only(model)

    def experts(self, model: nn.Module) -> list[ExpertsRef]:
        """Modules of fused experts; see `experts.experts`."""
        from torchwrap.integrations.transformers import experts

        return experts.experts(model)

    def attention(self, model: nn.Module, service: Any, prefix: str = "") -> AttentionRoute | None:
        """Led through the registries of attention and mask functions; see `attention.route`."""
        from torchwrap.integrations.transformers import attention

        return attention.route(model, service, prefix)

    def loading(self) -> AbstractContextManager[LoadingState]:
        """Whether `from_pretrained` or `from_config` is constructing modules in this thread; see `loading.loading_state`."""
        from torchwrap.integrations.transformers import loading

        return nullcontext(loading.loading_state())

    def opens(self, folder: Path) -> bool:
        """True if the folder has a config.json that names a model type."""
        from torchwrap.integrations.transformers import checkpoint

        return checkpoint.read_config(Path(folder)) is not None

    def skeleton(self, folder: Path, work: os.PathLike[str], *, dtype: torch.dtype | None = None) -> Skeleton:
        """The model of a checkpoint folder without its weights; see `skeleton.skeleton`."""
        from torchwrap.integrations.transformers import skeleton

        return skeleton.skeleton(folder, work, dtype=dtype)

    def source(self, model: nn.Module) -> Path | None:
        """The local folder the model was loaded from, if it is known and there."""
        from torchwrap.integrations.transformers import loading

        return loading.source(model)

    def activation_bytes(self, model: nn.Module, *, batch: int, tokens: int) -> int | None:
        """Bytes that one forward needs beside the weights; see `memory.activation_bytes`."""
        from torchwrap.integrations.transformers import memory

        return memory.activation_bytes(model, batch=batch, tokens=tokens)

    def inputs(self, model: nn.Module, *, batch: int, tokens: int) -> dict[str, torch.Tensor] | None:
        """Keywords of a training forward; see `inputs.inputs`."""
        from torchwrap.integrations.transformers import inputs

        return inputs.inputs(model, batch=batch, tokens=tokens)


integration: TransformersIntegration = TransformersIntegration()
