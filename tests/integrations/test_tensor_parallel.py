"""transformers models divided by their `tp_plan` compute the same with tiled sums as without, and as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.processes import Results, close, of, together
from tests.integrations.tensor_parallel_cases import IDS, LEFT_PADDED, MODELS
from torchwrap.attention.distributed.deferred import Deferred
from torchwrap.attention.distributed.tiled import Rows
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return together((2,), "tests.integrations.tensor_parallel_cases", tmp_path_factory)


def visible(logits: Tensor) -> Tensor:
    """Of tokens, not of padding, whose rows see no key."""
    return logits[LEFT_PADDED.bool()]


def alone(name: str) -> dict[str, Any]:
    """The model in one process, as transformers computes it."""
    model: Any = MODELS[name].build()
    with torch.no_grad():
        logits = model(IDS, attention_mask=LEFT_PADDED).logits
    tokens = model.generate(IDS, attention_mask=LEFT_PADDED, max_new_tokens=6, do_sample=False)
    model(IDS, labels=IDS).loss.backward()
    return {"logits": logits, "tokens": tokens, "grads": {name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("case", ["llama 3", "qwen2 auto", "mixtral 5"])
def test_tiled_sums_equal_the_untiled_model_and_one_process(results: Results, case: str) -> None:
    expected = alone(case.split()[0])
    for process in of(results, 2, case):
        for other in (process["before"], expected):
            close(visible(process["tiled"]["logits"]), visible(other["logits"]))
            assert torch.equal(process["tiled"]["tokens"], other["tokens"])
            assert process["tiled"]["grads"].keys() == other["grads"].keys()
            for name, grad in other["grads"].items():
                close(process["tiled"]["grads"][name], grad)


@pytest.mark.parametrize(("case", "blocks"), [("llama 3", 3), ("mixtral 5", 5)])
def test_every_call_with_several_rows_is_cut_and_decoding_is_not(results: Results, case: str, blocks: int) -> None:
    for process in of(results, 2, case):
        assert process["counts"] == [blocks] * 6  # two layers; logits, the prompt, the training step
        assert f"2 output projections summed over their processes in blocks ({blocks})" in " ".join(process["notes"].split())


def test_processes_measure_together_and_choose_the_same(results: Results) -> None:
    first, second = of(results, 2, "qwen2 auto")
    assert first["counts"] == second["counts"]


@pytest.mark.parametrize("case", ["llama 3", "qwen2 auto", "mixtral 5", "off"])
def test_unwrapping_gives_transformers_own_sums_back(results: Results, case: str) -> None:
    for process in of(results, 2, case):
        assert process["later"] == []
        assert torch.equal(process["after"]["logits"], process["before"]["logits"])
        assert all(torch.equal(grad, process["before"]["grads"][name]) for name, grad in process["after"]["grads"].items())


def test_one_block_is_the_model_s_own_order(results: Results) -> None:
    for process in of(results, 2, "off"):
        assert process["counts"] == []
        close(visible(process["tiled"]["logits"]), visible(process["before"]["logits"]))


def test_what_is_watched_or_changed_on_its_way_is_not_tiled(results: Results) -> None:
    model: Any = MODELS["llama"].build()
    with torch.no_grad():
        expected = model(IDS).logits
    for process in of(results, 2, "watched"):
        close(process["logits"], expected)
        assert process["counts"] == [3] and process["adapted"] == [3]  # the other layer's
        assert process["shape"] == (2, 24, 16) and process["kind"] == "Tensor"


def test_a_group_that_does_not_fit_is_refused(results: Results) -> None:
    for rank, process in enumerate(of(results, 2, "refused")):
        assert isinstance(process["others"], errors.ConfigError) and f"[{rank}]" in str(process["others"])
        assert isinstance(process["none"], errors.UnsupportedModelError) and "tp_group" in str(process["none"])


def test_a_process_that_fails_between_blocks_is_named_and_the_group_is_not_used_again(results: Results) -> None:
    other, failing = of(results, 2, "broken")
    assert isinstance(failing["first"], MemoryError)
    assert isinstance(other["first"], errors.WorkError) and "block 2 failed" in str(other["first"])
    for process in (other, failing):
        assert isinstance(process["later"], errors.WorkError) and "out of step" in str(process["later"])
        close(process["anew"], process["expected"])


def rows() -> Rows:
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=make) for heads in (4, 2, 2))
    return Rows(q.requires_grad_(), k, v, TileMask.causal(1, 6, 6))


@pytest.mark.parametrize(
    "turned",
    [lambda x: x.reshape(2, 6, -1), lambda x: x.reshape((2, 6, 32)), lambda x: x.view(2, 6, 32).contiguous(), lambda x: x.contiguous()],
    ids=["reshape", "tuple", "view", "contiguous"],
)
def test_deferred_attention_goes_through_turning_as_it_is(turned: Any) -> None:
    deferred = turned(Deferred.of(rows()))
    assert isinstance(deferred, Deferred) and not deferred.is_computed
    assert torch.equal(deferred.compute(), turned(rows().heads(0, 6).transpose(1, 2).contiguous()))


@pytest.mark.parametrize(
    "use",
    [lambda x: x * 2, lambda x: torch.ones(()) * x, lambda x: x[0], lambda x: x.transpose(1, 2), lambda x: x.reshape(12, -1),
     lambda x: torch.cat([x, x]), lambda x: x.float().norm(dim=-1)],
    ids=["times", "times it", "index", "transpose", "other shape", "cat", "norm"],
)  # fmt: skip
def test_whatever_else_touches_it_gets_the_numbers_and_their_gradients(use: Any) -> None:
    call = rows()
    deferred = Deferred.of(call)
    used = use(deferred)
    assert not isinstance(used, Deferred) and deferred.is_computed and deferred.reshape(2, 6, -1).is_computed
    assert torch.equal(used, use(rows().heads(0, 6).transpose(1, 2)))
    used.sum().backward()
    assert call.q.grad is not None and bool(call.q.grad.any())
