"""fast_attention on torchvision's transformers and on diffusers' networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests import torchvision_ops

torchvision_ops.ensure()


def network(name: str, side: int) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = models.get_model(name, weights=None, **options)
        for key, parameter in model.named_parameters():
            if "head" in key or "relative_position_bias_table" in key or parameter.dim() == 1:  # these start at or near zero
                nn.init.normal_(parameter, std=0.3)
    return model


# 61 pixels make 16 x 16 places, of which windows of 7 must be filled up; 28 make one window, which is not shifted.
NETWORKS = [("vit_b_32", 64), ("swin_t", 61), ("swin_t", 28), ("swin_v2_t", 64)]


@pytest.mark.parametrize(("name", "side"), NETWORKS, ids=[f"{name}-{side}" for name, side in NETWORKS])
def test_networks_of_torchvision(name: str, side: int) -> None:
    model = network(name, side).eval()
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        tw.fast_attention(model)
        got = model(x)
    scale = expected.abs().max()
    assert scale > 0.1
    assert (got - expected).abs().max() < 1e-4 * scale
    handle = tw.handle_of(model, "fast_attention")
    assert sum(handle.stats()["served"].values()) == 12
    with torch.no_grad(), tw.disabled(model):
        assert torch.equal(model(x), expected)
    tw.unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_gradients_of_windowed_attention(name: str) -> None:
    x, gradients = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1)), []
    for wrapped in (True, False):
        model = network(name, 48).eval()
        part = nn.Sequential(model.features[0], model.features[1])
        if wrapped:
            tw.fast_attention(part)
        part(x).square().mean().backward()
        gradients.append({key: value.grad for key, value in part.named_parameters()})
    for key, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], expected, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ), {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": torch.randn(2, 5, 16)}  # fmt: skip


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=16), {"sample": torch.randn(1, 3, 16, 16)}


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 9, 4), "encoder_hidden_states": torch.randn(1, 6, 32), "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]), "img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip


@pytest.mark.parametrize("make", [unet, autoencoder, flux], ids=["unet", "autoencoder", "flux"])
def test_networks_of_diffusers(make: Any) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, given = make()
    model.eval()
    processors = [type(getattr(module, "processor", None)) for module in model.modules()]
    with torch.no_grad():
        expected = model(**given).sample
        tw.fast_attention(model)
        torch.testing.assert_close(model(**given).sample, expected, rtol=1e-4, atol=1e-5)
        assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) >= 2
        tw.unwrap(model)
        assert torch.equal(model(**given).sample, expected)
    assert [type(getattr(module, "processor", None)) for module in model.modules()] == processors


def test_a_processor_that_computes_attention_itself_is_refused_by_name() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor

    model, _ = unet()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(tw.UnsupportedModelError, match="AttnProcessor") as caught:
        tw.fast_attention(model)
    assert caught.value.where.startswith("down_blocks.0")
    assert tw.wrappers_of(model) == {}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("AttnProcessor", "AttnProcessor2_0"), ("SlicedAttnProcessor", "AttnProcessor2_0"),
        ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"), ("SanaLinearAttnProcessor2_0", None),
    ],
)  # fmt: skip
def test_only_a_processor_that_computes_the_same_is_recommended(name: str, other: str | None) -> None:
    processors = pytest.importorskip("diffusers.models.attention_processor")
    model, _ = unet()
    model.set_attn_processor(getattr(processors, name)(*[2] * name.startswith("Sliced")))
    with pytest.raises(tw.UnsupportedModelError) as caught:
        tw.fast_attention(model)
    assert f"set_attn_processor({other}())" in caught.value.fix if other else "set_attn_processor" not in caught.value.fix


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, img_size=56, window_size=7, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
        num_classes=7,
    ).eval()  # fmt: skip
    for key, parameter in model.named_parameters():
        if "relative_position_bias_table" in key or "head" in key:
            nn.init.normal_(parameter, std=0.5)
    return model


def test_windowed_attention_of_timm_is_served_though_its_switch_is_off() -> None:
    model, x = timm_swin(), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            tw.fast_attention(model)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 4
            tw.unwrap(model)
            assert torch.equal(model(x), expected)
    assert not any(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))


class Chooses(nn.Module):
    """Attention that calls torch's function only if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.quick = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quick:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return (x @ x.mT * x.shape[-1] ** -0.5).softmax(-1) @ x


def test_code_that_takes_another_way_is_told() -> None:
    x = torch.randn(1, 2, 5, 8)
    model = tw.fast_attention(nn.Sequential(Chooses()))
    with pytest.warns(tw.TorchwrapWarning, match="Chooses took a way without"):
        model(x)
    assert "Chooses" in tw.handle_of(model, "fast_attention").explain()
    strict = tw.fast_attention(nn.Sequential(Chooses()), fallback="error")
    with pytest.raises(tw.UnsupportedModelError, match="Chooses"):
        strict(x)
    model[0].quick = True
    model(x)
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 1


def test_attention_that_stays_as_it_is_is_named_beside_what_is_served() -> None:
    class OwnAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.q(x) @ x.mT).softmax(-1) @ x

    model = tw.fast_attention(nn.Sequential(Chooses(), OwnAttention(), OwnAttention()))
    assert "2 OwnAttention left as they are" in str(tw.describe(model))


def test_masks_of_shifted_windows_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.integrations.torchvision import attention

    model, x, made = network("swin_t", 61).eval(), torch.randn(2, 3, 61, 61), []
    regions = attention._regions
    monkeypatch.setattr(attention, "_regions", lambda *args: made.append(args) or regions(*args))
    attention._kept.cache_clear()
    tw.fast_attention(model)
    with torch.inference_mode():
        expected = model(x)
    first = len(made)
    assert 0 < first < 6  # fewer than layers with shifts
    model.train()(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    assert len(made) == first
