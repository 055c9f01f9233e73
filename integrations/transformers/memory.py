"""Bytes that one forward of a transformers model needs beside its weights, from its configuration.

Letters: B batch, T tokens, C hidden width, F neurons of the MLP, H heads, K key/value heads, D head width, V vocabulary, L blocks, e bytes
per number. The forward walks through the blocks with one residual stream (B T C), each block works in a few copies of C and F per token
and gives them back, a decoder keeps 2 L B K D T for its cache, and the head ends in B T V logits. What a block gave back is counted
although it is free again by the time the logits are made: the C library's allocator keeps freed pieces below 32 MiB, so the process does
not shrink (measured: peaks follow the sum, not the maximum). Figures were fitted to VmHWM of fresh processes (torch 2.13, CPU), see
tests/integrations/test_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["activation_bytes", "frames_of_sound"]

# What libraries allocate once in the first forward of a process, whatever its size (threads, packed kernels, caches). Measured: 14 MiB
# for a Llama of one token; see the module's test.
FIRST_FORWARD_BYTES = 14 << 20

HIDDEN_COPIES = 6  # residual, normed input, q, k, v and attention output of one block, in units of B T C (measured; k, v may be smaller)
GATED_COPIES, PLAIN_COPIES = 3, 2  # of B T F: act(gate), up and their product; or the first layer's output and its activation

# Where configurations keep the width of the MLP; attribute_map of the library covers the other names.
NEURONS = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "hidden_dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
GATES = ("gate_proj", "gate_up_proj", "wi_1")


def activation_bytes(model: nn.Module, *, batch: int, tokens: int) -> int | None:
    """Bytes one forward adds to a fresh process beside the weights: working set of a block, logits, cache, first-call costs.

    Args:
        model: a transformers model; parameters may be on `meta` or absent.
        batch: sequences (or images) per call, B.
        tokens: tokens per sequence, T, of both sides for an encoder-decoder. Image towers take their number of patches from the config,
            Whisper its frames.

    Returns:
        Bytes, or None for a model without a usable configuration. Logits of all tokens are counted; `generate` asks for the last token's
        only, so its prompt needs up to `B T V e` less.

    Exactness: an estimate for inference without gradients. Measured peaks of a process are within 10 % (see the tests).
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    stacks = _stacks(model, config, batch, tokens)
    if not stacks:
        return None
    # The residual streams of the towers live on (features, encoder output); the blocks work one after another.
    total = FIRST_FORWARD_BYTES + sum(2 * stack.hidden for stack in stacks) + max(stack.working for stack in stacks)
    text = stacks[-1]
    if config.is_encoder_decoder:
        total += text.cache + stacks[0].cache  # of the decoder's own tokens and of the encoder's
        total += _position_bias(text)
    elif _keeps_cache(model, text.config):
        total += text.cache
    return total + _logits(model, text)


@dataclass(frozen=True, slots=True)
class _Stack:
    """One stack of blocks and what runs through it."""

    config: Any
    tokens: int  # B T
    sequence: int  # T
    element: int  # e
    gated: bool
    eager: bool

    @property
    def hidden(self) -> int:
        """The residual stream: B T C e."""
        return self.tokens * _number(self.config, "hidden_size", "d_model") * self.element

    @property
    def working(self) -> int:
        """What one block holds at its widest, besides the residual stream it was given."""
        config = self.config
        heads = _number(config, "num_attention_heads", "num_heads", "encoder_attention_heads", default=1)
        width = self.hidden // max(1, self.tokens * self.element)
        neurons = _number(config, *NEURONS, default=4 * width)
        # A mixture of experts runs each token through several, from one gathered copy of its hidden state per expert.
        experts = _number(config, "num_experts_per_tok", default=1) if _number(config, *EXPERTS) else 1
        copies = GATED_COPIES + 1 if experts > 1 else GATED_COPIES if self.gated else PLAIN_COPIES
        mlp = copies * self.tokens * neurons * self.element * experts + (experts - 1) * 2 * self.hidden
        norm = 2 * self.tokens * width * 4 if self.element < 4 else 0  # norms of half-precision models compute in float32
        # Eager attention holds scores, their float32 softmax and its cast; the fused kernel only the mask, one byte per pair.
        pairs = self.tokens * self.sequence
        attention = pairs * heads * (2 * self.element + 4) if self.eager else pairs
        return HIDDEN_COPIES * self.hidden + max(mlp, attention, norm)

    @property
    def cache(self) -> int:
        """Keys and values of all blocks; blocks with a sliding window keep only that."""
        config = self.config
        heads = _number(config, "num_attention_heads", "num_heads", "decoder_attention_heads", default=1)
        shared = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)  # Falcon
        key_heads = 1 if shared else _number(config, "num_key_value_heads", "num_kv_heads", default=heads)
        width = _number(config, "head_dim", "d_kv") or _number(config, "hidden_size", "d_model") // heads
        layers = _number(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        window = _number(config, "sliding_window", default=self.sequence)
        batch = self.tokens // max(1, self.sequence)
        kept = sum(min(self.sequence, window) if kind == "sliding_attention" else self.sequence for kind in kinds)
        return 2 * batch * kept * key_heads * width * self.element


def _stacks(model: nn.Module, config: Any, batch: int, tokens: int) -> list[_Stack]:
    element = _element(model)
    gated = any(not set(name.split(".")).isdisjoint(GATES) for name, _ in model.named_parameters())
    found = []
    for part, positions, is_gated in _parts(config, tokens, gated):
        if _number(part, "hidden_size", "d_model"):
            eager = getattr(part, "_attn_implementation", None) == "eager"
            found.append(_Stack(part, batch * positions, positions, element, is_gated, eager))
    return found


def _parts(config: Any, tokens: int, gated: bool) -> list[tuple[Any, int, bool]]:
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        return [(vision, _patches(vision), False), (config.get_text_config(), tokens, gated)]
    if getattr(config, "image_size", None) is not None:
        return [(config, _patches(config), gated)]
    if config.is_encoder_decoder:
        return [(config, frames_of_sound(config) or tokens, gated), (config, tokens, gated)]
    return [(config, tokens, gated)]


def frames_of_sound(config: Any) -> int:
    """Positions of an encoder that takes sound of one length only (Whisper's); 0 for all others."""
    hears = getattr(config, "is_encoder_decoder", False) and getattr(config, "num_mel_bins", None) is not None
    return int(getattr(config, "max_source_positions", 0)) if hears else 0


def _patches(config: Any) -> int:
    side, patch = getattr(config, "image_size", 224), getattr(config, "patch_size", None) or 16
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    down, across = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return int((height // down) * (width // across) + 1)


def _keeps_cache(model: Any, config: Any) -> bool:
    if not getattr(config, "use_cache", False):
        return False
    causal = any(getattr(part, "is_causal", False) and getattr(part, "layer_idx", None) is not None for part in model.modules())
    return causal or bool(getattr(config, "is_decoder", False)) or bool(getattr(model, "can_generate", bool)())


def _logits(model: Any, text: _Stack) -> int:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        return 0
    # transformers 5.23 keeps logits in the model's dtype; only soft-capping (Gemma 2) holds a second copy while it computes.
    copies = 2 if getattr(text.config, "final_logit_softcapping", None) else 1
    return copies * text.tokens * int(weight.shape[0]) * text.element


def _position_bias(text: _Stack) -> int:
    if getattr(text.config, "relative_attention_num_buckets", None) is None:
        return 0
    # T5 adds a learned bias to the scores: made once per stack, in every head, and merged with the mask in a second tensor.
    heads = _number(text.config, "num_attention_heads", "num_heads", default=1)
    return 4 * heads * text.sequence * text.tokens * text.element


def _element(model: nn.Module) -> int:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return torch.float32.itemsize if first is None else first.dtype.itemsize


def _number(config: Any, *names: str, default: int = 0) -> int:
    """The first of these fields that is set and not zero; the largest of a list (stages of a Swin, say)."""
    found = next((value for name in names if (value := getattr(config, name, None))), default)
    return int(max(found) if isinstance(found, (list, tuple)) else found)
