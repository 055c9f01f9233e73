"""fast_attention on trained weights: SmolLM2's logits and tokens in every way of generating, MiniLM's sentence vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from tests import torchvision_ops
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import StorageError
from torchwrap.demo import weights

torchvision_ops.ensure()

pytestmark = pytest.mark.slow

TEXTS = [
    "The lighthouse keeper wrote in his log that the storm had",
    "A recipe for bread needs flour, water, salt and yeast. First, mix the flour and the salt in a large bowl; then",
]
TOKENS = 64


def loaded(folder: Any, kind: str, implementation: str) -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation).eval()


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The model, an eager one with the same weights, and two sentences padded on the left."""
    import transformers

    try:
        folder = weights.smollm2()
    except StorageError as error:
        pytest.skip(str(error))
    model, twin = loaded(folder, "AutoModelForCausalLM", "sdpa"), loaded(folder, "AutoModelForCausalLM", "eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    given = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert int(given["attention_mask"].sum()) < given["attention_mask"].numel()
    return tw.fast_attention(model), twin, dict(given)


def test_logits_are_those_of_eager_attention(smollm2: Any) -> None:
    model, twin, given = smollm2
    seen, before = given["attention_mask"].bool(), TileMask.materialisations
    with torch.no_grad():
        difference = (model(**given).logits - twin(**given).logits)[seen].abs().max()
    assert difference < 1e-4
    assert TileMask.materialisations == before


def generated(model: Any, given: dict[str, torch.Tensor], **how: Any) -> torch.Tensor:
    how = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    tokens = model.generate(**given, **how)
    return tokens[:, given["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def greedy(smollm2: Any) -> torch.Tensor:
    """64 tokens of eager attention after each sentence."""
    _, twin, given = smollm2
    return generated(twin, given)


def test_64_greedy_tokens_of_a_padded_batch_are_those_of_eager_attention(smollm2: Any, greedy: torch.Tensor) -> None:
    model, _, given = smollm2
    assert torch.equal(generated(model, given), greedy)


ONE: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "assisted": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("how", ONE)
def test_64_greedy_tokens_of_one_sentence_are_those_of_eager_attention(smollm2: Any, greedy: torch.Tensor, how: str) -> None:
    model, _, given = smollm2
    alone = {name: value[1:] for name, value in given.items()}
    assert bool(alone["attention_mask"].all())
    assert torch.equal(generated(model, alone, **ONE[how]), greedy[1:])


def test_64_greedy_tokens_of_a_padded_batch_with_a_static_cache_are_those_of_eager_attention(smollm2: Any, greedy: torch.Tensor) -> None:
    model, _, given = smollm2
    assert torch.equal(generated(model, given, **ONE["static"]), greedy)


def test_64_tokens_of_three_beams_are_those_of_eager_attention(smollm2: Any) -> None:
    model, twin, given = smollm2
    alone = {name: value[:1] for name, value in given.items()}
    assert torch.equal(generated(model, alone, num_beams=3), generated(twin, alone, num_beams=3))


def test_tokens_of_continuous_batching_are_those_of_sdpa(smollm2: Any) -> None:
    """More requests than fit at once, of different lengths, some with the same beginning."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, twin, given = smollm2
    sentences = [ids[mask.bool()].tolist() for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    prompts = [*sentences, sentences[1] * 3, sentences[0][:1], sentences[1][:20] + sentences[0]]
    how = {
        "generation_config": GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=10, page_size=16, max_batch_tokens=48),
    }
    twin.set_attn_implementation("sdpa")
    try:
        theirs = [result.generated_tokens for result in twin.generate_batch(prompts, **how).values()]
    finally:
        twin.set_attn_implementation("eager")
    calls = sum(tw.handle_of(model, "fast_attention").stats()["served"].values())
    assert [result.generated_tokens for result in model.generate_batch(prompts, **how).values()] == theirs
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) > calls


def test_a_quantised_cache_keeps_its_error(smollm2: Any) -> None:
    """8-bit floats make a step of a sixteenth of the last bit of a key, so tokens may part; the error must not grow."""
    from transformers import QuantizedCache

    model, twin, given = smollm2
    prompt, rest = given["input_ids"][1:, :-4], given["input_ids"][1:, -4:]
    logits = []
    for each, kind in ((twin, None), (twin, "fp8"), (model, "fp8")):
        cache = None if kind is None else QuantizedCache(backend=kind, config=each.config)
        with torch.no_grad():
            cache = each(prompt, past_key_values=cache, use_cache=True).past_key_values
            logits.append(each(rest, past_key_values=cache).logits)
    theirs, ours = ((quantised - logits[0]).abs().mean() for quantised in logits[1:])
    assert 0 < ours < 1.1 * theirs


def test_sentence_vectors_of_minilm_point_the_same_way() -> None:
    import transformers

    try:
        folder = weights.minilm()
    except StorageError as error:
        pytest.skip(str(error))
    model, twin = tw.fast_attention(loaded(folder, "AutoModel", "sdpa")), loaded(folder, "AutoModel", "eager")
    given = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    vectors = []
    with torch.no_grad():
        for each in (model, twin):
            states, mask = each(**given).last_hidden_state, given["attention_mask"][..., None]
            vectors.append((states * mask).sum(1) / mask.sum(1))
    assert torch.cosine_similarity(*vectors).min() > 0.999999
