"""What a transformers model is called with in training: shapes and types only."""

from __future__ import annotations

from typing import Any

import torch

from torchwrap.integrations.transformers.memory import frames_of_sound

__all__ = ["inputs"]


def inputs(model: Any, *, batch: int, tokens: int) -> dict[str, torch.Tensor] | None:
    """Keywords for a forward of `batch` sequences (or images) of `tokens` tokens; None where they cannot be told from the configuration.

    An encoder-decoder gets as many tokens on both sides, one that hears (Whisper) as much sound as it always takes.
    A model of text and images gets text alone. Images have the size that the configuration names, and so as many tokens.
    """
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})}
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    frames = frames_of_sound(config)
    if name == "input_features" and config is not None and frames:
        sound = torch.zeros(batch, config.num_mel_bins, 2 * frames, dtype=floating)  # the encoder begins by halving them
        return {"input_features": sound, "decoder_input_ids": torch.zeros(batch, tokens, dtype=torch.long)}
    side = getattr(config, "image_size", None)
    if name == "pixel_values" and side is not None:
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), height, width, dtype=floating)}
    return None
