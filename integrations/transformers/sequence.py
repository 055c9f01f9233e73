"""transformers models whose sequences are divided over processes: checks, masks of whole sequences, and inputs cut to a process' part.

Each process calls the model with its tokens; attention is over all (`DividedSequence`), everything else in a decoder works token by token.
A model does not know that its tokens are a part: left alone it numbers positions from 0, makes a mask of its own tokens, and shifts labels
past the edge of its part. So positions are filled in or checked, masks are made for the whole sequence from the same rule, and labels have
to come shifted, as `shard_inputs` gives them. Caches of parts would be of use to nobody: generating is refused.

Letters: B batch, T processes, S tokens of the whole sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchwrap.attention.distributed.sequence import DividedSequence
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.masks.packing import key_conditions
from torchwrap.core.errors import ConfigError, UnsupportedModelError
from torchwrap.core.layer import CallState, Layer
from torchwrap.core.swap import original_class
from torchwrap.integrations.transformers.families import blocks
from torchwrap.integrations.transformers.masks import divided_mask

__all__ = ["DividedCall", "SequenceLayer", "refuse_to_divide", "running", "shard_inputs"]

IGNORED = -100  # transformers' label of what is not to be predicted
MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

_running = CallState()
"""The divided calls of this thread, innermost last."""


def shard_inputs(inputs: Mapping[str, Any], sequence: DividedSequence) -> dict[str, Any]:
    """The part of this process of what a causal language model is called with.

    Args:
        inputs: `input_ids` or `inputs_embeds` of whole sequences `[B, S, ...]`, the same on every process, and whatever else belongs to
            tokens: `attention_mask`, `position_ids`, `labels`.
        sequence: over which processes.

    Returns:
        Everything with S tokens cut to this process' part; `position_ids` of the whole sequence. Labels come shifted, as `labels` and
        `shift_labels`, with `num_items_in_batch`, their number in the whole batch: the losses of all processes add up to the loss of one
        process, and so do gradients.

    Raises:
        ConfigError: no tokens, or their number cannot be divided evenly.
    """
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if tokens is None:
        raise ConfigError("there are neither input_ids nor inputs_embeds", where="shard_inputs")
    length = tokens.shape[1]
    whole = {"position_ids": torch.arange(length, device=tokens.device)[None], **inputs}
    if whole.get("labels") is not None:
        shifted = torch.nn.functional.pad(whole["labels"], (0, 1), value=IGNORED)[..., 1:]
        whole.update(labels=shifted, shift_labels=shifted, num_items_in_batch=(shifted != IGNORED).sum())
    divided = {name for name, value in whole.items() if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length}
    return {name: sequence.part(value) if name in divided else value for name, value in whole.items()}


@dataclass(frozen=True)
class DividedCall:
    """What all processes agreed on when a model was called.

    Attributes:
        sequence: over which processes.
        batch: B.
        tokens: of this process, S / T.
        padding: conditions of the whole mask.
    """

    sequence: DividedSequence
    batch: int
    tokens: int
    padding: dict[str, Tensor]

    def mask(
        self, *, mask_function: Callable[..., Any], q_length: int, kv_length: int, device: torch.device | str = "cpu", **_: Any
    ) -> TileMask:
        """The mask of whole sequences for the rule of a mask of parts.

        Raises:
            UnsupportedModelError: the rule is not known, or depends on where a part begins.
        """
        if (q_length, kv_length) != (self.tokens, self.tokens):
            raise UnsupportedModelError(f"a mask of {q_length} queries and {kv_length} keys over {self.tokens} tokens", where="sp_group")
        return divided_mask(mask_function, self.batch, self.tokens * self.sequence.size, self.padding, device)


def running() -> DividedCall | None:
    """The innermost divided call of this thread."""
    found: DividedCall | None = _running.peek()
    return found


class SequenceLayer(Layer):
    """Stands on each model: lets a call begin when all processes came with parts of the same sequences."""

    where = "outside"
    traceable = False

    def __init__(self, fqn: str, sequence: DividedSequence) -> None:
        self.fqn, self.sequence = fqn, sequence

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positions filled in; the call under way is what `running` gives."""
        outer = running()
        if outer is None:
            names = list(inspect.signature(original_class(module).forward).parameters)[1:]
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
            outer = self._agreed(module, kwargs)
            if "use_cache" in names:
                kwargs["use_cache"] = False
        _running.push(outer)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The call is over."""
        _running.pop()
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        """The call is over."""
        _running.pop()

    def _agreed(self, module: nn.Module, kwargs: dict[str, Any]) -> DividedCall:
        """The call of all processes; whoever cannot go on says so before anybody raises."""
        sequence = self.sequence
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        batch, tokens = (0, 0) if given is None else given.shape[:2]
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu")) if given is None else given.device
        valid = kwargs.get("attention_mask")
        problem: Exception | None = None
        offsets = None
        try:
            self._check(module, kwargs, batch, tokens)
            positions = sequence.positions(tokens, device)[None]
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = positions
            offsets = _offsets(kwargs["position_ids"], positions, None if valid is None else valid.to(device) != 0, batch)
        except Exception as error:  # raised below, when the others know
            problem = error
        facts = [batch, tokens, int(valid is not None), ("zigzag", "contiguous", "ulysses").index(sequence.way)]
        rows = sequence.agree(facts, problem, device)
        if any(row != rows[0] for row in rows):
            said = "; ".join(f"process {rank}: {row[0]} x {row[1]}{' with a mask' * row[2]}" for rank, row in enumerate(rows))
            raise ConfigError(
                f"processes came with parts that do not belong together ({said})", where=self.fqn or "sp_group",
                fix="Give every process as many tokens, and all or none an attention_mask, under the same ring=.",
            )  # fmt: skip
        assert offsets is not None
        return DividedCall(sequence, batch, tokens, self._padding(valid, offsets))

    def _padding(self, valid: Tensor | None, offsets: Tensor) -> dict[str, Tensor]:
        """Conditions of the whole mask; raises alike on every process, because all look at the same."""
        mask = offsets.new_zeros(offsets.shape[0], 0) if valid is None else (valid != 0).to(offsets)
        parts = self.sequence.parts(torch.cat([offsets[:, None], mask], 1))
        first = torch.stack([part[:, 0] for part in parts])
        known = torch.where(first == _UNKNOWN, first.amax(0), first)
        if bool((known != known[0]).any()):
            raise _wrong_positions(self.sequence.layout, self.fqn)
        return {} if valid is None else key_conditions(self.sequence.joined([part[:, 1:] for part in parts]) != 0)

    def _check(self, module: nn.Module, kwargs: dict[str, Any], batch: int, tokens: int) -> None:
        """Raises what this process alone can see."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        reason, fix = None, "Unwrap the model for this call."
        if not tokens:
            reason, fix = "there are no tokens", "Give input_ids or inputs_embeds."
        elif self.sequence.layout == "zigzag" and tokens % 2:
            reason, fix = (
                f"{tokens} tokens cannot be an early and a late part",
                "Pad the whole sequence to a multiple of twice the processes.",
            )
        elif kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            reason, fix = (
                "a cache would hold a part of every sequence, so that nothing can be generated from it",
                "Generate with the model unwrapped.",
            )
        elif kwargs.get("output_attentions"):
            reason = "the weights of attention (output_attentions=True) are not computed"
        elif mask is not None and not isinstance(mask, Tensor):
            reason, fix = f"attention_mask is a {type(mask).__name__}", "Give this process' part of a mask of two dimensions."
        elif mask is not None and tuple(mask.shape) != (batch, tokens):
            reason, fix = (
                f"attention_mask is {list(mask.shape)}, not [{batch}, {tokens}]",
                "Give this process' part of a mask of two dimensions.",
            )
        elif positions is not None and (positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != tokens):
            reason, fix = f"position_ids are {list(positions.shape)}, not [{batch}, {tokens}]", "Leave them out, or use shard_inputs(...)."
        elif kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
            reason, fix = "labels would be shifted within a part", "Use shard_inputs(...), which shifts them in the whole sequence."
        if reason is not None:
            raise ConfigError(
                f"a model whose sequences are divided over processes cannot be called so: {reason}", where=self.fqn or "model", fix=fix
            )


_UNKNOWN = torch.iinfo(torch.int64).min


def _offsets(given: Tensor, expected: Tensor, valid: Tensor | None, batch: int) -> Tensor:
    """How far the positions of each row are from those of the layout, int64 [B]; `_UNKNOWN` for rows without tokens.

    Raises:
        ConfigError: not the same for all tokens of a row.
    """
    far = (given - expected).expand(batch, -1).long()
    seen = torch.ones_like(far, dtype=torch.bool) if valid is None else valid.expand(batch, -1)
    low = far.masked_fill(~seen, torch.iinfo(torch.int64).max).amin(1)
    high = far.masked_fill(~seen, _UNKNOWN).amax(1)
    if bool((seen.any(1) & (low != high)).any()):
        raise _wrong_positions("given", "position_ids")
    return high


def _wrong_positions(layout: str, where: str) -> ConfigError:
    return ConfigError(
        f"position_ids are not those of this process' tokens in the {layout} layout",
        where=where or "position_ids",
        fix="Leave them out, or use shard_inputs(...) with the same ring= as the model.",
    )


def refuse_to_divide(model: Any, sites: list[tuple[str, nn.Module]]) -> None:
    """Check that tokens of this model meet in its attention only.

    Raises:
        UnsupportedModelError: they meet elsewhere, or its outputs are not per token.
    """
    kind, reason = original_class(model), None
    config = model.config
    names = inspect.signature(kind.forward).parameters
    types = set(getattr(config, "layer_types", None) or ())
    mixing = next((name for name, module in model.named_modules() if isinstance(module, MIXING)), None)
    if config.is_encoder_decoder or not all(getattr(module, "is_causal", False) for _, module in sites):
        reason = "it is no decoder"
    elif "position_ids" not in names:
        reason = "it takes no position_ids"
    elif mixing is not None:
        reason = f"{mixing} is a {type(model.get_submodule(mixing)).__name__}, in which tokens meet as well"
    elif types - LAYER_TYPES:
        reason = f"it has layers of type {', '.join(sorted(types - LAYER_TYPES))}"
    elif len(sites) != len(blocks(model)):
        reason = f"{len(blocks(model))} blocks have {len(sites)} attention modules that can be led elsewhere"
    elif model.base_model is not model and model.get_output_embeddings() is None:
        reason = "its outputs are not those of a language model, token by token"
    if reason is not None:
        raise UnsupportedModelError(
            f"the sequences of {kind.__name__} cannot be divided over processes: {reason}", where=kind.__name__, fix="Leave sp_group out."
        )
