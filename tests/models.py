"""Small real models on which every part of the library is tested.

Each fixture is one record: how to build the model (the same numbers every time), inputs for one forward, and what the model can do.
The models are real architectures with tiny sizes, so that a forward takes a few milliseconds while the repeated blocks still hold
most of the weights, as they do in the models people use. Between them they have tied weights, a block that is called several times,
experts, an encoder with a decoder, images, batch norms with running statistics, and modules reached by two names.

A test asks for what it needs: `select(generates=True)` gives the fixtures with that flag.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests import torchvision_ops

__all__ = ["FIXTURES", "SHORT_LLAMA", "ModelFixture", "SharedMLP", "by_name", "run", "select"]

torchvision_ops.ensure()

VOCABULARY = 96


@dataclass(frozen=True, kw_only=True)
class ModelFixture:
    """One small model: `build()` makes it (equal weights on every call, eval mode), `inputs()` the keywords of one forward."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    block: str
    framework: str = "torch"
    generates: bool = False
    encoder_decoder: bool = False
    vision: bool = False
    tied: bool = False
    shared: bool = False
    batchnorm: bool = False
    has_dropout: bool = False
    has_hidden_states: bool = False
    has_attentions: bool = False

    def build(self) -> nn.Module:
        """A new model with the same weights as every other one of this fixture, in eval mode."""
        return _recording(self).copy()  # a small part of the time of making it, and tests ask for thousands

    def construct(self) -> nn.Module:
        """The same by the constructor of its class, for tests that change what the constructor does."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(20)  # torch.manual_seed formats a stack for each device that is not there
            return self.make().eval()

    def prompt(self) -> dict[str, Any]:
        """Inputs of `generate`: those of a forward without what belongs to the decoder."""
        return {name: value for name, value in self.inputs().items() if not name.startswith("decoder_")}


@functools.cache
def _recording(fixture: ModelFixture) -> _Recording:
    return _Recording(fixture.construct())


class _Recording:
    """A model of which copies are made as `copy.deepcopy` makes them, in a third of its time: the walk over the objects is made once.

    The model is never called, so that nothing is cached in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._leaves: list[Any] = []
        file = io.BytesIO()
        _Recorder(file, self._leaves).dump(model)
        self._pickled = file.getvalue()

    def copy(self) -> nn.Module:
        """A new model with equal weights, which shares with others what `copy.deepcopy` would: functions and classes."""
        return _Player(io.BytesIO(self._pickled), self._leaves).load()


class _Recorder(pickle.Pickler):
    """Pickles objects, and keeps aside what copies itself or is not copied."""

    def __init__(self, file: io.BytesIO, leaves: list[Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._leaves = leaves

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, type) or not (hasattr(obj, "__deepcopy__") or isinstance(obj, types.FunctionType)):
            return None
        self._leaves.append(obj)
        return len(self._leaves) - 1


class _Player(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, leaves: list[Any]) -> None:
        super().__init__(file)
        self._leaves = leaves
        self._memo: dict[int, Any] = {}  # one for the whole model: a tensor that stands at two places stands there in the copy

    def persistent_load(self, pid: int) -> Any:
        return copy.deepcopy(self._leaves[pid], self._memo)


def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Any:
    """One forward without gradients."""
    with torch.no_grad():
        return model(**inputs, **more)


def _tokens(batch: int = 2, length: int = 9, *, low: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(low, VOCABULARY - 2, (batch, length), generator=generator)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _text() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0  # left padding: an implementation that drops the mask gives other numbers
    return {"input_ids": _tokens(), "attention_mask": mask}


def _image() -> dict[str, Any]:
    return {"pixel_values": _noise(2, 3, 16, 16)}


# --- transformers ----------------------------------------------------------------------------------------------------------------


def _decoder(**changes: Any) -> dict[str, Any]:
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return sizes | changes


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder()))


def _short_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(num_hidden_layers=2)))


def _llama_tied() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(tie_word_embeddings=True, attention_dropout=0.1)))


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_decoder(tie_word_embeddings=True)))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**_decoder(num_hidden_layers=2, intermediate_size=64), num_local_experts=4, num_experts_per_tok=2)
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0))


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=4, num_attention_heads=4)
    return OPTForCausalLM(
        OPTConfig(**sizes, word_embed_proj_dim=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None))


def _t5_inputs() -> dict[str, Any]:
    return _text() | {"decoder_input_ids": _tokens(2, 5)}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    return BertModel(BertConfig(**sizes, max_position_embeddings=64))


def _albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    sizes = dict(vocab_size=VOCABULARY, embedding_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    return AlbertModel(AlbertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, hidden_dropout_prob=0.1))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=8)
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=5))


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    common = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    text = dict(vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = dict(image_size=16, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=32))


def _clip_inputs() -> dict[str, Any]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)} | _image()


_IMAGE_TOKEN = VOCABULARY - 1


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8, projection_dim=32
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**_decoder(num_hidden_layers=3)),
            image_token_index=_IMAGE_TOKEN,
            image_seq_length=4,
        )
    )


def _llava_inputs() -> dict[str, Any]:
    tokens = _tokens()
    tokens[:, 1:5] = _IMAGE_TOKEN  # 16 x 16 pixels in patches of 8 make four image tokens
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | _image()


# --- torch and torchvision -------------------------------------------------------------------------------------------------------


class _ConvBlock(nn.Module):
    """Two convolutions with batch norm around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(inner)))


class ConvNet(nn.Module):
    """A plain image classifier: stem, equal blocks, pooled linear head. Batch norms keep running statistics."""

    def __init__(self, channels: int = 16, depth: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_ConvBlock(channels) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def _convnet() -> nn.Module:
    model = ConvNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh statistics would hide a wrapper that loses them
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)


def _resnet18() -> nn.Module:
    from tests.narrow_resnet import NarrowResNet

    return NarrowResNet(classes=5)


class SharedMLP(nn.Sequential):
    """A sequence of blocks in which one block stands at two places and two linear maps of other blocks share one weight."""

    def __init__(self, width: int = 24) -> None:
        shared, first, second = (_Feedforward(width) for _ in range(3))
        second.up.weight = first.up.weight
        super().__init__(nn.Linear(8, width), nn.Sequential(shared, first, shared, second), nn.Linear(width, 8))


class _Feedforward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def _transformers(name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], block: str, *flags: str) -> ModelFixture:
    return ModelFixture(name=name, make=make, inputs=inputs, block=block, framework="transformers", **dict.fromkeys(flags, True))


_CAPTURES = ("has_hidden_states", "has_attentions")
_GENERATES = ("generates", *_CAPTURES)

FIXTURES: tuple[ModelFixture, ...] = (
    _transformers("llama", _llama, _text, "model.layers.1", *_GENERATES),
    _transformers("llama-tied", _llama_tied, _text, "model.layers.1", *_GENERATES, "tied", "has_dropout"),
    _transformers("qwen2", _qwen2, _text, "model.layers.1", *_GENERATES, "tied"),
    _transformers("mixtral", _mixtral, _text, "model.layers.1", *_GENERATES),
    _transformers("gpt2", _gpt2, _text, "transformer.h.1", *_GENERATES, "tied", "has_dropout"),
    _transformers("opt", _opt, _text, "model.decoder.layers.1", *_GENERATES, "tied", "has_dropout"),
    _transformers("t5", _t5, _t5_inputs, "encoder.block.1", *_GENERATES, "tied", "has_dropout", "encoder_decoder"),
    _transformers("bert", _bert, _text, "encoder.layer.1", *_CAPTURES, "has_dropout"),
    _transformers("albert", _albert, _text, "encoder.albert_layer_groups.0.albert_layers.0", *_CAPTURES, "shared", "has_dropout"),
    _transformers("vit", _vit, _image, "vit.layers.1", *_CAPTURES, "vision"),
    _transformers("clip", _clip, _clip_inputs, "text_model.encoder.layers.1", "vision"),
    _transformers("llava", _llava, _llava_inputs, "model.language_model.layers.1", *_GENERATES, "vision"),
    ModelFixture(name="convnet", make=_convnet, inputs=lambda: {"x": _noise(2, 3, 16, 16)}, block="blocks.1", vision=True, batchnorm=True),
    ModelFixture(name="encoder", make=_encoder, inputs=lambda: {"src": _noise(2, 7, 32)}, block="layers.1", has_dropout=True),
    ModelFixture(
        name="resnet18",
        make=_resnet18,
        inputs=lambda: {"x": _noise(2, 3, 32, 32)},
        block="layer2.1",
        framework="torchvision",
        vision=True,
        batchnorm=True,
    ),
    ModelFixture(name="mlp", make=SharedMLP, inputs=lambda: {"input": _noise(4, 8)}, block="1.0", tied=True, shared=True),
)


SHORT_LLAMA = replace(FIXTURES[0], make=_short_llama)
"""The first fixture with half as many blocks, for what takes longer the more there are, whatever their size: compiling."""


def by_name(name: str) -> ModelFixture:
    """The fixture of this name."""
    return next(fixture for fixture in FIXTURES if fixture.name == name)


def select(**flags: object) -> tuple[ModelFixture, ...]:
    """Fixtures whose fields have these values: `select(generates=True, encoder_decoder=False)`."""
    return tuple(fixture for fixture in FIXTURES if all(getattr(fixture, name) == value for name, value in flags.items()))
