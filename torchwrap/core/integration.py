"""What is known about other people's model classes: the protocol, how integrations are found, and the generic fall-back.

Core knows no framework. An integration is one object that answers questions about a family of models: which blocks repeat, which
weights are tied, how a checkpoint folder is opened. It is chosen by the modules that the model's class and its bases come from, so a
framework that the program has not imported is not imported here either. Third parties add families through the entry point group
`torchwrap.integrations`. A model that nobody knows is served by `Integration` itself, which reads the module tree only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchwrap.core.errors import TorchwrapWarning, UnsupportedModelError
from torchwrap.core.layer import Layer
from torchwrap.core.swap import original_class
from torchwrap.core.tensors import tied_groups

__all__ = [
    "AttentionRoute",
    "BlockRef",
    "ExpertsRef",
    "Integration",
    "LoadingState",
    "Skeleton",
    "integration_for",
    "integration_for_folder",
    "known_integrations",
]

_BUILT_IN = {
    "transformers": "torchwrap.integrations.transformers",
    "torchvision": "torchwrap.integrations.torchvision",
    "diffusers": "torchwrap.integrations.diffusers",
}


@dataclass(frozen=True)
class BlockRef:
    """One of the repeated layers of a model.

    Attributes:
        fqn: name of the block in the model.
        module: the block.
        container: name of the `ModuleList` or `Sequential` that holds it.
    """

    fqn: str
    module: nn.Module
    container: str


@dataclass(frozen=True)
class ExpertsRef:
    """A module whose experts are slices of its parameters.

    Attributes:
        fqn: name of the module in the model.
        parameters: names of its parameters of shape (count, ...).
        count: how many experts there are.
        routed: called with the module and its call's args and kwargs before it runs: an integer tensor with the index of every expert
            that the call will use (repeats are fine), or `None` if it may use all.
    """

    fqn: str
    module: nn.Module
    parameters: tuple[str, ...]
    count: int
    routed: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], torch.Tensor | None]


@dataclass
class AttentionRoute:
    """How a family's attention comes to call a function of ours: found and checked, nothing switched yet.

    Copies and pickles with the model it belongs to.

    Attributes:
        places: layers to stand on modules, as (name in the model, module, layer).
        attends: names of the modules whose attention is led through the function.
        generates: names of models that will generate with caches made by the route, if the service asks for such.
        notes: remarks for `describe`.
        divides: True if it serves a model whose sequences are divided over processes.
    """

    places: list[tuple[str, nn.Module, Layer]] = field(default_factory=list)
    attends: list[str] = field(default_factory=list)
    generates: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    divides: bool = False

    def set(self) -> None:
        """Switch on what layers alone cannot, such as a configured name. Must not raise half-way."""

    def busy(self) -> str | None:
        """Why it cannot be undone now, or None."""
        return None

    def plan(self, tokens: int, batch: int) -> Any:
        """What caches of so many tokens and rows will take; None for models without a growing cache."""
        return None

    def restore(self) -> None:
        """Undo `set`, where nobody has changed it since. Not called while it is busy."""


@dataclass
class Skeleton:
    """A model without its weights, and where they are.

    Attributes:
        model: parameters all on `meta` (tied ones tied), buffers real and correct.
        weights: name of a parameter or persistent buffer (one per tied group is enough) to (safetensors file, key in it).
    """

    model: nn.Module
    weights: dict[str, tuple[Path, str]]


@dataclass(frozen=True)
class LoadingState:
    """Whether a framework's loader is constructing modules in this thread.

    Attributes:
        active: True while a loader runs: a model made now gets its weights later.
        loader: the loader's name for messages, such as `from_pretrained`.
    """

    active: bool = False
    loader: str = ""


class Integration:
    """Answers about a family of models; this base class answers from the module tree alone.

    Attributes:
        name: shown in reports.
        tested: `{package: (oldest, newest)}` versions the integration was tested with; outside it warns once.
    """

    name: str = "generic"
    tested: ClassVar[dict[str, tuple[str, str]]] = {}

    def matches(self, model: nn.Module) -> bool:
        """Does this integration know the model's class? Must not import the framework."""
        return False

    def blocks(self, model: nn.Module) -> list[BlockRef] | None:
        """The repeated layers in call order; `None` if there are none.

        The generic answer is the longest `ModuleList` or `Sequential` whose members share a class and that is not part of
        another such container's members; the one with more parameters among equally long ones.
        """
        return _longest_chain(model)

    def tied(self, model: nn.Module) -> list[list[str]]:
        """Groups of parameter names that reach one tensor."""
        return tied_groups(model)

    def no_split(self, model: nn.Module) -> tuple[str, ...]:
        """Names of classes whose instances must stay in one piece."""
        return ()

    def gather_only(self, model: nn.Module) -> tuple[type[nn.Embedding], ...]:
        """Embedding classes whose forward picks rows of the weight by its first argument and then works row by row."""
        return (nn.Embedding,)

    def experts(self, model: nn.Module) -> list[ExpertsRef]:
        """Modules with an expert in each slice of their parameters, of which a call uses only those that its tokens are routed to."""
        return []

    def attention(self, model: nn.Module, service: Any, prefix: str = "") -> AttentionRoute | None:
        """How this model's attention can be led elsewhere; `None` if it has none.

        Args:
            model: the model.
            service: who computes it, a `torchwrap.attention.service.Service`.
            prefix: name of the model in a larger one, which the names in the route begin with.

        Raises:
            UnsupportedModelError: there is attention that cannot be led elsewhere; nothing has been touched.
        """
        return None

    def loading(self) -> AbstractContextManager[LoadingState]:
        """Tells, as a context, whether one of this framework's loaders is constructing modules now."""
        return nullcontext(LoadingState())

    def opens(self, folder: Path) -> bool:
        """Can `skeleton` build the model stored in this folder?"""
        return False

    def skeleton(self, folder: Path, work: os.PathLike[str], *, dtype: torch.dtype | None = None) -> Skeleton:
        """The model of a checkpoint folder, without reading its weights.

        Args:
            folder: the checkpoint.
            work: a private folder for converted weights, if the stored keys or shapes are not the model's. It may be made only when its
                name is asked for (`os.fspath`), so leave that alone if nothing has to be converted.
            dtype: of the parameters; `None` is what the folder says.

        Raises:
            UnsupportedModelError: the folder holds nothing this integration can build.
        """
        raise UnsupportedModelError(f"the {self.name} integration cannot open a folder", where=str(folder))

    def source(self, model: nn.Module) -> Path | None:
        """The folder the model was loaded from, if known."""
        return None

    def activation_bytes(self, model: nn.Module, *, batch: int, tokens: int) -> int | None:
        """Bytes one forward needs besides weights (activations, logits, cache); `None` if unknown."""
        return None

    def inputs(self, model: nn.Module, *, batch: int, tokens: int) -> dict[str, torch.Tensor] | None:
        """Keywords of a training forward on so many sequences, of which only shapes and types matter; `None` if unknown."""
        return None


def integration_for(model: nn.Module) -> Integration:
    """The integration that knows this model, or the generic one."""
    roots = {entry.__module__.partition(".")[0] for entry in type(model).__mro__}
    for package, module in _BUILT_IN.items():
        if package in roots:
            integration = _load(module)
            if integration.matches(model):
                return _gate(integration)
    for integration in _entry_points():
        if integration.matches(model):
            return _gate(integration)
    return _GENERIC


def integration_for_folder(folder: str | Path) -> Integration:
    """The integration that can build the model stored in `folder`.

    Raises:
        UnsupportedModelError: none can; the message lists those that were asked.
    """
    path = Path(folder)
    if path.is_file():
        raise UnsupportedModelError("this is a file and no folder", where=str(path), fix=f"Give its folder: {str(path.parent)!r}.")
    if not path.is_dir():
        raise UnsupportedModelError(
            "there is no such checkpoint folder",
            where=str(path),
            fix="Give a folder; huggingface_hub.snapshot_download(name) downloads a model of the hub and returns its folder.",
        )
    asked = []
    for integration in known_integrations():
        if integration.opens(path):
            return _gate(integration)
        asked.append(integration.name)
    names = sorted(entry.name for entry in path.iterdir())
    held = f"in it: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "the folder is empty"
    raise UnsupportedModelError(
        f"no integration can build the model in this folder (asked: {', '.join(asked) or 'none installed'}; {held})",
        where=str(path),
        fix="Build the model yourself and apply the technique to it, or install the framework that saved it.",
    )


def known_integrations() -> Iterator[Integration]:
    """Every integration whose framework is installed, built-in ones first."""
    for package, module in _BUILT_IN.items():
        if importlib.util.find_spec(package) is not None:
            yield _load(module)
    yield from _entry_points()


def _load(module: str) -> Integration:
    integration: Integration = importlib.import_module(module).integration
    return integration


@functools.cache
def _entry_points() -> tuple[Integration, ...]:
    found = []
    for entry in importlib.metadata.entry_points(group="torchwrap.integrations"):
        if entry.name not in _BUILT_IN:
            try:
                found.append(entry.load())
            except ImportError as error:
                warnings.warn(f"integration {entry.name!r} cannot be imported: {error}", TorchwrapWarning, stacklevel=4)
    return tuple(found)


@functools.cache
def _gate(integration: Integration) -> Integration:
    """Warn once if an installed version is outside what the integration was tested with."""
    for package, (oldest, newest) in integration.tested.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not _release(oldest) <= _release(installed)[: len(_release(newest))] <= _release(newest):
            warnings.warn(
                f"{package} {installed} is outside the versions the {integration.name} integration was tested with ({oldest} to {newest})",
                TorchwrapWarning,
                stacklevel=4,
            )
    return integration


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _longest_chain(model: nn.Module) -> list[BlockRef] | None:
    best: tuple[int, int] = (1, 0)
    chain: list[BlockRef] | None = None
    inside: tuple[str, ...] = ()
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or name.startswith(inside or ("\0",)):
            continue
        members = list(container.named_children())
        if len({original_class(member) for _, member in members}) != 1 or len(members) < 2:
            continue
        prefix = f"{name}." if name else ""
        # What lies inside a member (a mixture's experts, say) is part of that block, however many there are.
        inside = (*inside, *(f"{prefix}{leaf}." for leaf, _ in members))
        score = (len(members), sum(parameter.numel() for parameter in container.parameters() if not is_lazy(parameter)))
        if score > best:
            best = score
            chain = [BlockRef(f"{prefix}{leaf}", member, name) for leaf, member in members]
    return chain


_GENERIC = Integration()
