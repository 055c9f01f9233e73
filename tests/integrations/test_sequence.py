"""Models of whose sequences each process has a part compute what one process computes, and what cannot be is refused by all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attention.processes import Results, close, of, together
from tests.integrations.sequence_cases import FOUR, IDS, LEFT_PADDED, MODELS, STEPS, batch
from torchwrap.attention.distributed.sequence import DividedSequence
from torchwrap.core import errors
from torchwrap.integrations.transformers.sequence import shard_inputs

EVERY = [(2, case) for case in STEPS] + [(4, case) for case in FOUR if case in STEPS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return together((2, 4), "tests.integrations.sequence_cases", tmp_path_factory)


@pytest.mark.parametrize(("size", "case"), EVERY)
def test_logits_loss_and_gradients_are_those_of_one_process(results: Results, size: int, case: str) -> None:
    padded = "padded" in case
    model: Any = MODELS[case.split()[0]].build()
    expected = model(**batch(padded))
    expected.loss.backward()
    # Rows of padding see no key: zeros here, the mean of all values in one process.
    visible = LEFT_PADDED.bool() if padded else torch.ones_like(LEFT_PADDED).bool()
    for process in of(results, size, case):
        close(process["logits"][visible], expected.logits[visible])
        close(process["loss"], expected.loss)
        for name, parameter in model.named_parameters():
            close(process["grads"][name], parameter.grad)


@pytest.mark.parametrize(("size", "case"), [(2, "llama zigzag"), (2, "llama ulysses"), (4, "mistral zigzag")])
def test_the_record_says_how_and_no_cache_is_returned(results: Results, size: int, case: str) -> None:
    for process in of(results, size, case):
        assert len(process["served"]) == 2 and all(f" {case.split()[1]} " in call for call in process["served"])
        assert process["cache"] is None


def test_unwrapped_a_model_attends_what_it_is_given(results: Results) -> None:
    model: Any = MODELS["llama"].build()
    with torch.no_grad():
        expected = model(IDS).logits
    for process in of(results, 2, "llama zigzag"):
        assert torch.equal(process["alone"], expected)


@pytest.mark.parametrize(
    ("case", "said"),
    [("generate", "nothing can be generated"), ("use_cache", "a cache would hold a part"), ("weights", "output_attentions"),
     ("labels", "shifted within a part"), ("mask", r"\[2, 1, 12, 12\]"), ("nothing", "no tokens"), ("masks by type", "is a dict"),
     ("odd", "11 tokens"), ("other layout", "position_ids"), ("other part", "position_ids"), ("masks", "process 1: 2 x 12 with a mask"),
     ("lengths", "process 0: 2 x 12; process 1: 2 x 10"), ("only one process", "a cache would hold a part")],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_every_process(results: Results, case: str, said: str) -> None:
    first, second = (process[case] for process in of(results, 2, "refused"))
    assert isinstance(first, errors.ConfigError) and isinstance(second, errors.ConfigError)
    with pytest.raises(errors.ConfigError, match=said):
        raise first
    if case in ("only one process", "other layout"):
        assert "process 0 of the group cannot" in str(second)


def test_after_refusals_the_next_call_works(results: Results) -> None:
    model: Any = MODELS["llama"].build()
    with torch.no_grad():
        expected = model(IDS).logits
    for process in of(results, 2, "refused"):
        close(process["logits"], expected)
        assert isinstance(process["dropout"], errors.UnsupportedModelError) and "attention_dropout" in str(process["dropout"])


@pytest.mark.parametrize(
    ("case", "kind", "said"),
    [("bert", errors.UnsupportedModelError, "no decoder"), ("t5", errors.UnsupportedModelError, "no decoder"),
     ("vit", errors.UnsupportedModelError, "no decoder"), ("llava", errors.UnsupportedModelError, "no decoder"),
     ("classifier", errors.UnsupportedModelError, "token by token"), ("torch", errors.UnsupportedModelError, "nobody knows"),
     ("backend", errors.ConfigError, "'sdpa'"), ("name", errors.ConfigError, "no such group"), ("both", errors.ConfigError, "tp_group")],
)  # fmt: skip
def test_models_and_settings_that_cannot_be_divided_are_refused(results: Results, case: str, kind: type[Exception], said: str) -> None:
    for process in of(results, 2, "unwrappable"):
        with pytest.raises(kind, match=said):
            raise process[case]


def test_a_group_of_others_is_refused(results: Results) -> None:
    member, other = of(results, 2, "unwrappable")
    assert "member" not in member
    assert isinstance(other["member"], errors.ConfigError)


def test_heads_that_cannot_be_exchanged_are_refused_before_anything_is_sent(results: Results) -> None:
    for process in of(results, 4, "too few heads"):
        assert isinstance(process["error"], errors.ConfigError) and "4 query and 2 key heads" in str(process["error"])


def test_a_process_that_fails_within_a_ring_is_named_and_the_group_is_not_used_again(results: Results) -> None:
    model: Any = MODELS["llama"].build()
    with torch.no_grad():
        expected = model(IDS).logits
    other, failing = of(results, 2, "broken")
    assert isinstance(failing["first"], MemoryError)
    assert isinstance(other["first"], errors.WorkError) and "block 0 failed" in str(other["first"])
    for process in (other, failing):
        assert isinstance(process["later"], errors.WorkError) and "out of step" in str(process["later"])
        close(process["anew"], expected)


def test_inputs_without_tokens_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="neither input_ids nor inputs_embeds"):
        shard_inputs({"labels": IDS}, DividedSequence())
