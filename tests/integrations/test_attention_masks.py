"""fast_attention on transformers models: masks that callers give, in every form that the models take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, InformerConfig, InformerModel

import torchwrap as tw
from tests.integrations import tiny
from tests.integrations.attending import LENGTH, built, inputs, no_materialisation

HIDDEN = 4
"""Columns without a token, at the left of row 0."""


def row_mask(kind: str, batch: int, length: int = LENGTH) -> torch.Tensor:
    """[batch, 1, 1, length]: which keys hold tokens, for all queries at once."""
    visible = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    visible[0, ..., :HIDDEN] = False
    if kind == "bool":
        return visible
    # Numbers other than 0 and the least are added to scores.
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min if kind == "float" else -2.0)


def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**given)
    found: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_mask_of_one_row_serves_every_query(name: str, kind: str, batch: int) -> None:
    model, twin = tw.fast_attention(built(name)), built(name)
    given = dict(inputs(name), attention_mask=row_mask(kind, batch, inputs(name)["input_ids"].shape[1]))
    with no_materialisation():
        ours = logits(model, given)
    torch.testing.assert_close(ours, logits(twin, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_one_row_serves_a_prompt_and_the_step_after_it(kind: str) -> None:
    model, twin, ids = tw.fast_attention(built("llama")), built("llama"), inputs("llama")["input_ids"]
    found = []
    for one in (model, twin):
        cache, steps = None, []
        for part in (ids, ids[:, :1], ids[:, 1:3]):
            length = part.shape[1] + (0 if cache is None else cache.get_seq_length())
            with torch.no_grad():
                out = one(input_ids=part, attention_mask=row_mask(kind, 2, length), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_mask_of_one_row_is_read_anew_for_another_number_of_queries() -> None:
    model, twin, given = tw.fast_attention(built("bert")), built("bert"), inputs("bert")
    mask = row_mask("bool", 2)
    for rows in (LENGTH, LENGTH - 5, LENGTH):
        part = {"input_ids": given["input_ids"][:, :rows], "attention_mask": mask[..., :rows]}
        torch.testing.assert_close(logits(model, part), logits(twin, part), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_oss"])
def test_sequences_of_a_collator_without_padding_do_not_see_each_other(name: str, cached: bool) -> None:
    parts = inputs(name)["input_ids"].flatten()[:20].split([9, 4, 7])
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": part.tolist()} for part in parts])
    del packed["labels"]
    model, twin = tw.fast_attention(built(name)), built(name)
    with no_materialisation():
        ours = logits(model, {**packed, "use_cache": cached})
    alone = torch.cat([logits(twin, {"input_ids": part[None]}) for part in parts], 1)
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


def test_gradients_of_packed_sequences_are_those_of_each_alone() -> None:
    parts = inputs("llama")["input_ids"].flatten()[:20].split([9, 4, 7])
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": part.tolist()} for part in parts])
    del packed["labels"]
    model, twin = tw.fast_attention(built("llama")), built("llama")
    model(**packed).logits.square().sum().backward()
    sum(twin(input_ids=part[None]).logits.square().sum() for part in parts).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_cumulative_lengths_of_other_tokens_are_refused() -> None:
    model, ids = tw.fast_attention(built("llama")), inputs("llama")["input_ids"]
    for rows, ends in ((ids[:1], [0, 4, 9]), (ids, [0, 4, LENGTH])):
        with pytest.raises(tw.ConfigError, match="cu_seq_lens end at"):
            logits(model, {"input_ids": rows, "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32)})


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_that_shortens_its_sequence_needs_no_mask(padded: bool) -> None:
    options = dict(
        prediction_length=6, context_length=12, input_size=1, num_time_features=1, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, lags_sequence=[1, 2], attention_type="full", distil=True,
    )  # fmt: skip
    torch.manual_seed(0)
    twin = InformerModel(InformerConfig(**options)).eval()
    model = tw.fast_attention(copy.deepcopy(twin))
    given = dict(
        past_values=torch.randn(2, 14), past_time_features=torch.randn(2, 14, 1), past_observed_mask=torch.ones(2, 14),
        future_values=torch.randn(2, 6), future_time_features=torch.randn(2, 6, 1),
    )  # fmt: skip
    if padded:
        given["past_observed_mask"][0, :3] = 0
    torch.testing.assert_close(logits(model, given), logits(twin, given), rtol=1e-4, atol=1e-5)


def test_a_module_that_does_not_say_whether_it_is_causal_is_what_its_own_function_takes_it_for() -> None:
    case = tiny.Case("SplinterModel", "SplinterConfig", dict(tiny._BERT, question_token_id=4, max_position_embeddings=64))
    given = case.inputs()
    ours = tw.fast_attention(case.build())
    torch.testing.assert_close(ours(**given)[0], case.build()(**given)[0], atol=1e-5, rtol=0)


def test_a_mask_of_flex_attention_goes_to_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    given, seen, model = inputs("llama")["input_ids"], [], tw.fast_attention(built("llama"))

    def flex(module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
        seen.append(attention_mask)
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", flex)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, LENGTH, LENGTH, device="cpu")
    with torch.no_grad(), pytest.warns(tw.TorchwrapWarning, match="FlexAttention"):
        model(input_ids=given, attention_mask=mask)
    assert seen == [mask] * 3
    assert not tw.handle_of(model, "fast_attention").stats()["served"]
