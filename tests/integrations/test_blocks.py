"""The blocks, tied groups and embeddings found in a model are those its forward uses, in the order it uses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.integrations.tiny import CASES, Case, case
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.integrations.transformers import integration

ROWS = pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)


@ROWS
def test_blocks_are_listed_in_the_order_of_their_first_calls(row: Case) -> None:
    model = row.build()
    found = integration.blocks(model)
    called: list[nn.Module] = []
    for block in found:
        block.module.register_forward_pre_hook(lambda module, args: called.append(module) if module not in called else None)
    with torch.no_grad():
        model(**row.inputs())
    assert [id(module) for module in called] == [id(block.module) for block in found]
    assert len(found) == row.blocks


@ROWS
def test_block_names_and_containers_lead_to_the_modules(row: Case) -> None:
    model = row.build()
    found = integration.blocks(model)
    assert tuple(dict.fromkeys(block.container for block in found)) == row.containers
    assert all(model.get_submodule(block.fqn) is block.module for block in found)
    assert all(block.module in list(model.get_submodule(block.container).children()) for block in found)


@ROWS
def test_blocks_hold_every_repeated_weight(row: Case) -> None:
    """What is left outside the blocks is embeddings, heads, norms and projections: none of it has a module twice."""
    model = row.build()
    inside = {id(p) for block in integration.blocks(model) for p in block.module.parameters()}
    kinds = [type(m).__name__ for m in model.modules() if type(m).__name__ in integration.no_split(model)]
    outside = [m for m in model.modules() if type(m).__name__ in kinds and not {id(p) for p in m.parameters()} <= inside]
    assert len({type(m) for m in outside}) == len(outside)


@ROWS
def test_tied_groups_are_the_shared_parameter_objects(row: Case) -> None:
    model = row.build()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    assert sorted(integration.tied(model)) == sorted(group for group in names.values() if len(group) > 1)


def test_tied_groups_on_meta_follow_the_mapping() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**case("LlamaForCausalLM-tied").arguments, "tie_word_embeddings": True}))
    assert integration.tied(model) == [["model.embed_tokens.weight", "lm_head.weight"]]


def test_a_head_untied_by_hand_is_not_tied() -> None:
    model = case("LlamaForCausalLM-tied").build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert integration.tied(model) == []


def test_a_known_family_without_its_list_is_refused_with_the_attribute() -> None:
    model = case("LlamaForCausalLM").build()
    model.model.stack = model.model.layers
    del model.model.layers
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel.*layers"):
        integration.blocks(model)


def test_an_unknown_family_without_a_list_is_refused_with_everything_looked_for() -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    class Flat(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(UnsupportedModelError, match=r"layers, h, layer"):
        integration.blocks(Flat(PreTrainedConfig()))


def test_a_subclass_of_the_users_own_is_found_like_its_base() -> None:
    row = case("LlamaForCausalLM")
    model = row.build()
    model.model.__class__ = type("MyBackbone", (type(model.model),), {})
    assert [block.fqn for block in integration.blocks(model)] == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("name", ["GemmaForCausalLM-tied", "Gemma3ForCausalLM-tied", "BartForConditionalGeneration-tied"])
def test_gather_only_embeddings_depend_on_the_looked_up_rows_alone(name: str) -> None:
    model = case(name).build()
    kinds = integration.gather_only(model)[1:]
    found = [module for module in model.modules() if type(module) in kinds]
    assert found
    for embedding in found:
        ids = torch.tensor([[5, 3], [7, 5]])
        small = copy.deepcopy(embedding)
        rows, index = torch.unique(ids, return_inverse=True)
        small.weight = nn.Parameter(embedding.weight.detach()[rows])
        small.padding_idx = None
        assert torch.equal(small(index), embedding(ids))


def test_every_scaled_embedding_class_of_the_table_is_one() -> None:
    """Each class named in the table that this transformers has computes rows times a constant."""
    import importlib
    import inspect
    import pkgutil

    import transformers.models as models

    from torchwrap.integrations.transformers.families import SCALED_EMBEDDINGS

    seen = 0
    families = {name.removesuffix("ScaledWordEmbedding").removesuffix("Text").lower() for name in SCALED_EMBEDDINGS}
    for package in pkgutil.iter_modules(models.__path__):
        if package.name.replace("_", "") not in families:
            continue
        module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and name in SCALED_EMBEDDINGS and kind.__module__ == module.__name__:
                embedding = kind(6, 4, 0, 3.0)
                nn.init.normal_(embedding.weight)
                assert torch.equal(embedding(torch.tensor([2, 5])), embedding.weight[[2, 5]] * 3.0)
                seen += 1
    assert seen >= 15


def test_an_embedding_that_computes_its_own_positions_is_not_gather_only() -> None:
    model = case("OPTForCausalLM-tied").build()
    assert type(model.model.decoder.embed_positions) is not nn.Embedding
    assert integration.gather_only(model) == (nn.Embedding,)


def test_matches_by_origin_of_the_class_only() -> None:
    assert integration.matches(case("LlamaModel").build())
    assert not integration.matches(nn.Linear(2, 2))
