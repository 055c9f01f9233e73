"""fast_attention on transformers models: outputs, gradients and tokens of every family as the eager function gives them."""

from __future__ import annotations

import pytest
import torch

import torchwrap as tw
from tests.integrations.attending import GENERATING, HOW, built, eager, every_family, inputs, no_materialisation, prompt, tensors


@every_family
@pytest.mark.filterwarnings("ignore:fast_attention leaves calls")
def test_outputs_are_those_of_eager_attention(name: str) -> None:
    given, model, twin = inputs(name), tw.fast_attention(built(name)), eager(name)
    with torch.no_grad(), no_materialisation():
        ours, theirs = tensors(name, model(**given), given), tensors(name, twin(**given), given)
    assert len(ours) == len(theirs) > 0
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    stats = tw.handle_of(model, "fast_attention").stats()
    assert len(stats["served"]) > 0
    # SigLIP's pooling asks nn.MultiheadAttention for weights and drops them.
    assert all("nn.MultiheadAttention" in key for key in stats["left"])


@every_family
@pytest.mark.filterwarnings("ignore:fast_attention leaves calls")
def test_gradients_are_those_of_eager_attention(name: str) -> None:
    given, gradients = inputs(name), []
    for model in (tw.fast_attention(built(name)), eager(name)):
        sum(part.square().mean() for part in tensors(name, model(**given), given) if part.is_floating_point()).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    ours, theirs = ({key for key, value in each.items() if value is not None} for each in gradients)
    assert ours == theirs
    for key, expected in gradients[1].items():
        if expected is not None:
            torch.testing.assert_close(gradients[0][key], expected, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", GENERATING)
def test_generated_tokens_are_those_of_eager_attention(name: str, how: str) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **HOW[how]}
    model, twin = tw.fast_attention(built(name)), eager(name)
    with no_materialisation():
        ours = model.generate(**prompt(name), **options)
    assert torch.equal(ours, twin.generate(**prompt(name), **options))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_on_meta_has_shapes_with_every_mask(family: str) -> None:
    import transformers

    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    kind = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "bert": ("BertConfig", "BertModel")}[family]
    with torch.device("meta"):
        model = getattr(transformers, kind[1])(getattr(transformers, kind[0])(**sizes)).eval()
        ids = torch.ones(2, 9, dtype=torch.long)
        masks = [None, torch.ones(2, 9, dtype=torch.long), torch.ones(2, 1, 9, 9, dtype=torch.bool), torch.zeros(2, 1, 9, 9)]
    tw.fast_attention(model)
    for mask in [*masks, torch.ones(2, 9, dtype=torch.long, device="cpu")]:
        out = model(input_ids=ids, attention_mask=mask)[0]
        assert out.shape[:2] == (2, 9) and out.is_meta
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 5
