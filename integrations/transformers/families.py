"""Where the repeated blocks of each transformers model family are, as a table.

Head classes come and go (`ForCausalLM`, `ForSequenceClassification`, `ForConditionalGeneration`), but the loop over blocks is written
once per family, in one class. So the table is keyed by the class that owns the loop, and a walk finds its instances wherever they sit
in a model: a Llama is the same under any head, and inside LLaVA. Towers are visited in the order the model calls them, which is the
order of registration unless `CALL_ORDER` says otherwise. A class that the table does not know is searched for the attribute names and
block classes (`_no_split_modules`) that the library's models use; what matches neither is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import BlockRef
from torchwrap.core.swap import original_class
from torchwrap.core.tensors import tied_groups

__all__ = ["blocks", "gather_only", "no_split", "tied"]

# Class that runs the loop -> attribute path of the list it loops over; `*` stands for each member of a list on the way.
STACKS: dict[str, str] = {
    "LlamaModel": "layers",
    "MistralModel": "layers",
    "MixtralModel": "layers",
    "Qwen2Model": "layers",
    "Qwen3Model": "layers",
    "GemmaModel": "layers",
    "Gemma2Model": "layers",
    "Gemma3TextModel": "layers",
    "Phi3Model": "layers",
    "OPTDecoder": "layers",
    "GPT2Model": "h",
    "GPTNeoXModel": "layers",
    "BloomModel": "h",
    "FalconModel": "h",
    "T5Stack": "block",
    "BertEncoder": "layer",
    "AlbertTransformer": "albert_layer_groups.*.albert_layers",
    "CLIPEncoder": "layers",
    "SiglipEncoder": "layers",
}

# Classes that run the loop themselves in one release of transformers and in a part of theirs in another: class -> path, tried in turn.
MOVED_STACKS: dict[str, tuple[str, ...]] = {
    "ViTModel": ("layers", "encoder.layer"),  # transformers 5 has the list in the model, 4 in its encoder
}

# Composite class -> its towers in the order of its forward, where that differs from the order of registration.
CALL_ORDER: dict[str, tuple[str, ...]] = {
    "CLIPModel": ("vision_model", "text_model"),  # registers the text tower first, calls the vision tower first
}

# Attribute names under which the library's models keep their blocks; searched in classes that are in no table.
BLOCK_ATTRIBUTES = ("layers", "h", "layer", "block", "blocks", "stages")

# Embedding classes whose forward is `super().forward(ids) * scale`. T5Gemma2's is left out: it compares the ids with a token.
SCALED_EMBEDDINGS = frozenset(
    f"{family}ScaledWordEmbedding"
    for family in (
        "Bart", "BigBirdPegasus", "BioGpt", "Blenderbot", "DiffusionGemmaText", "EmbeddingGemma2Text", "GemmaText", "Gemma2Text",
        "Gemma3Text", "Gemma3nText", "Gemma4Text", "Gemma4UnifiedText", "M2M100", "MBart", "MiniCPM3", "NllbMoe", "PegasusX", "PLBart",
        "PPFormulaNet", "SeamlessM4T", "SeamlessM4Tv2", "TrOCR", "VaultGemmaText", "XGLM",
    )
)  # fmt: skip


def blocks(model: nn.Module) -> list[BlockRef]:
    """Repeated layers of a transformers model in the order their first calls happen.

    Works for every head class and for models nested in models. A block used several times per forward (ALBERT) is listed once.

    Returns:
        One `BlockRef` per block: name, module, and the name of the list that holds it.

    Raises:
        UnsupportedModelError: a family of the table lacks the attribute it should have, or no list of blocks was found at all.
    """
    known = no_split(model)
    found: dict[int, BlockRef] = {}
    for block in _walk("", model, frozenset(known)):
        found.setdefault(id(block.module), block)
    if not found:
        raise UnsupportedModelError(
            f"no list of blocks in a {type(model).__name__}: looked for attributes {', '.join(BLOCK_ATTRIBUTES)} holding modules of one "
            f"class, and for lists of {', '.join(known) or '(the model names no _no_split_modules)'}",
            fix="Name the blocks yourself, e.g. units=('encoder.my_blocks',), or register an integration (entry point group "
            "'torchwrap.integrations').",
        )
    return list(found.values())


def no_split(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes that this model and the models in it ask to keep whole (`_no_split_modules`), sorted."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return tuple(sorted(names))


def tied(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor.

    Identity decides: a pair that the model's mapping (`all_tied_weights_keys`) names but that are two tensors with storage is not tied
    (the user or the checkpoint untied it). On `meta`, where tensors have no content that could differ, the mapping is believed too.
    """
    groups = [set(group) for group in tied_groups(model)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in parameters and source in parameters and parameters[target].is_meta and parameters[source].is_meta:
            groups.append({target, source})
    order = {name: position for position, name in enumerate(parameters)}
    return [sorted(group, key=order.__getitem__) for group in _merge(groups)]


def gather_only(model: nn.Module) -> tuple[type[nn.Embedding], ...]:
    """Exact classes of the model's embeddings that gather rows by their first argument and then at most scale each row."""
    kinds: set[Any] = {original_class(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    scaled = (kind for kind in kinds if kind.__name__ in SCALED_EMBEDDINGS and kind.__module__.startswith("transformers."))
    return (nn.Embedding, *sorted(scaled, key=lambda kind: kind.__qualname__))


def _walk(prefix: str, module: nn.Module, known: frozenset[str]) -> Iterator[BlockRef]:
    path = _stack_path(prefix, module)
    if path is not None:
        yield from _expand(prefix, module, path.split("."))
        return
    for name, child in _children(module):
        here = f"{prefix}.{name}" if prefix else name
        if _looks_like_blocks(name, child, known):
            yield from _expand(here, child, [])
        else:
            yield from _walk(here, child, known)


def _stack_path(prefix: str, module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        if not kind.__module__.startswith("transformers."):
            continue
        paths = MOVED_STACKS.get(kind.__name__) or ((STACKS[kind.__name__],) if kind.__name__ in STACKS else ())
        for path in paths:
            if _reach(module, path.split(".")):
                return path
        if paths:
            raise UnsupportedModelError(
                f"{kind.__name__} has no list of blocks where it should be: looked for {' or '.join(paths)}",
                where=prefix or type(module).__name__,
                fix="The installed transformers may be newer than this release of torchwrap; see integrations/transformers/README.md for "
                "the versions it was tested with.",
            )
    return None


def _reach(module: nn.Module, steps: list[str]) -> bool:
    if not steps:
        return isinstance(module, (nn.ModuleList, nn.Sequential))
    if steps[0] == "*":
        return len(list(module.children())) > 0 and all(_reach(child, steps[1:]) for child in module.children())
    child = module._modules.get(steps[0])
    return child is not None and _reach(child, steps[1:])


def _expand(prefix: str, module: nn.Module, steps: list[str]) -> Iterator[BlockRef]:
    if steps and steps[0] != "*":
        yield from _expand(f"{prefix}.{steps[0]}" if prefix else steps[0], module.get_submodule(steps[0]), steps[1:])
        return
    for name, child in module._modules.items():
        if child is not None:
            here = f"{prefix}.{name}" if prefix else name
            if steps:
                yield from _expand(here, child, steps[1:])
            else:
                yield BlockRef(fqn=here, module=child, container=prefix)


def _children(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    first = CALL_ORDER.get(type(module).__name__, ())
    named = dict(module.named_children())
    return sorted(named.items(), key=lambda item: first.index(item[0]) if item[0] in first else len(first))


def _looks_like_blocks(name: str, child: nn.Module, known: frozenset[str]) -> bool:
    if not isinstance(child, (nn.ModuleList, nn.Sequential)):
        return False
    members = list(child.children())
    names = {original_class(member).__name__ for member in members}
    if names and names <= known:
        return True
    alike = len(members) > 1 and len({original_class(member) for member in members}) == 1
    return alike and name in BLOCK_ATTRIBUTES and all(any(True for _ in member.children()) for member in members)


def _merge(groups: list[set[str]]) -> list[set[str]]:
    merged: list[set[str]] = []
    for group in groups:
        touching = [other for other in merged if other & group]
        merged = [other for other in merged if not other & group] + [group.union(*touching)]
    return [group for group in merged if len(group) > 1]
