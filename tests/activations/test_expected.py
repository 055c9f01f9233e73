"""What blocks are expected to save, against what autograd saves; and what a step takes with each choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from torchwrap.activations.choose import Cost
from torchwrap.activations.expected import expected_costs, over_recomputed

transformers = pytest.importorskip("transformers")

TOKENS = 64


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "use_cache": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes})).train()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "intermediate_size": 512}], ids=["plain", "grouped"])
def test_expected_bytes_are_near_those_that_autograd_saves(changes: dict[str, Any]) -> None:
    model = tw.offload(llama(**changes), activations="auto", params="disk")
    handle = tw.handle_of(model, "offload")
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 64
    for _ in range(2):  # measured in the first, known from the second on
        model(input_ids=ids, labels=ids).loss.backward()
    measured = [use.at(TOKENS) for use in handle.activations._uses]
    expected = expected_costs(handle.units, TOKENS)
    assert [use.unit for use in measured] == [use.unit for use in expected]
    for one, other in zip(expected, measured, strict=True):
        assert one.nbytes == pytest.approx(other.nbytes, rel=0.15)
        assert one.input_bytes == other.input_bytes == TOKENS * 64 * 4


@pytest.mark.parametrize("mode", ["keep", "recompute", "disk", "auto"])
def test_layers_in_a_row_keep_what_they_save_whatever_becomes_of_blocks(mode: Any) -> None:
    """There is no block to compute again: ten layers keep their inputs and outputs, which is most of a step's memory."""
    layers = [layer for _ in range(10) for layer in (torch.nn.Linear(576, 576), torch.nn.GELU())]
    model = tw.offload(torch.nn.Sequential(*layers), activations=mode, goal="train", params="disk")
    handle = tw.handle_of(model, "offload")
    few, many = (handle.predict_training(batch=1, tokens=rows) for rows in (64, 1064))
    saved = 10 * 2 * 1000 * 576 * 4
    assert saved < many.working_bytes - few.working_bytes < saved + 1000 * (2 * 65536 + 2 * 4 * 576)
    assert many.swapped_bytes == 0


def test_bytes_beyond_a_step_that_recomputes() -> None:
    uses = [Cost(unit, 100, 10, 0.0) for unit in range(5)]
    every = range(5)
    assert over_recomputed(uses, dict.fromkeys(every, "recompute")) == 0
    assert over_recomputed(uses, dict.fromkeys(every, "keep")) == 4 * (100 - 10)
    assert over_recomputed(uses, dict.fromkeys(every, "swap")) == 100 - 4 * 10
    # Where the gradients stay, those of all blocks are there when what was kept is not: 5 * 80 + 100 at the first block, then, instead
    # of 5 * 100 + 80 at the last one.
    assert over_recomputed(uses, dict.fromkeys(every, "keep"), dict.fromkeys(every, 80)) == 580 - 500


def test_training_computes_again_unless_told_otherwise() -> None:
    assert tw.Offload(goal="train").activations == "auto"
    assert tw.Offload(goal="train", activations="keep").activations == "keep"
    assert (tw.Offload().activations, tw.Superpipeline().activations) == ("keep", "keep")
    assert tw.Offload.from_dict(tw.Offload(goal="train").to_dict()) == tw.Offload(goal="train")


def test_the_forecast_goes_by_the_mode() -> None:
    found = {}
    for mode in ("recompute", "disk", "keep", "auto"):
        model = tw.offload(llama(num_hidden_layers=6), activations=mode, goal="train", params="disk")
        found[mode] = tw.handle_of(model, "offload").predict_training(batch=2, tokens=TOKENS).working_bytes
        if mode == "keep":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            itself = tw.handle_of(model, "offload").predict_training(batch=2, tokens=TOKENS).working_bytes
    assert found["recompute"] == found["auto"] == itself < found["disk"] < found["keep"]
