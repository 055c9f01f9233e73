"""Every architecture of the installed transformers, made tiny: are the streamed model's numbers those of the plain one?

    python -m benchmarks.harness.architectures                 all that can be built, into docs/results/architectures.json
    python -m benchmarks.harness.architectures llama t5 vit    these, printed only

Each is built with random weights from its own configuration class, with sizes reduced; those that cannot be (a required file, sizes that
contradict each other, more parameters than `MOST`) are counted and named, not judged. Then `offload` at its smallest budget and
`superpipeline` with one block each run two forwards, a forward and backward in training mode, and are undone. Everything is compared with
`torch.equal`. Nothing is chosen by hand here, so this says what a user with a model that no test names has to expect.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchwrap as tw
from benchmarks.harness.results import RESULTS

__all__ = ["compare", "main"]

MOST = 12_000_000
"""Parameters of the largest model that is built; some configurations ignore the sizes they are given."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "encoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "state_size", "patch_size"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "image_size", "hidden_dim", "lru_width"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group", "bos_token_id", "decoder_start_token_id"), 1),
    "vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2, "hidden_sizes": [16, 32], "rotary_dim": 4, "expand": 2,
}  # fmt: skip


class _NotBuilt(Exception):
    """Why an architecture is not judged."""


def compare(name: str) -> dict[str, str]:
    """What each technique did with one architecture: "equal", "refused: ...", "different: ..." or "error: ...", by technique."""
    model, inputs = _build(name)
    return {technique: _judge(copy.deepcopy(model), model, inputs, technique) for technique in ("offload", "superpipeline")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if anything was different or failed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; none: all")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    verdicts: dict[str, dict[str, str]] = {}
    not_built: dict[str, str] = {}
    for name in given.names or sorted(CONFIG_MAPPING.keys()):
        try:
            verdicts[name] = compare(name)
            print(f"{name:<28} {verdicts[name]}")
        except _NotBuilt as reason:
            not_built[name] = str(reason)
        gc.collect()
    counts = {
        technique: dict(Counter(verdict[technique].partition(":")[0] for verdict in verdicts.values()))
        for technique in ("offload", "superpipeline")
    }
    print(json.dumps(counts), f"not built: {len(not_built)}")
    if not given.names:
        _write(RESULTS / "architectures.json", counts, verdicts, not_built)
    return int(any(verdict.startswith(("different", "error")) for each in verdicts.values() for verdict in each.values()))


def _write(path: Path, counts: Any, verdicts: dict[str, dict[str, str]], not_built: dict[str, str]) -> None:
    import transformers

    equal = [name for name, verdict in verdicts.items() if set(verdict.values()) == {"equal"}]
    path.write_text(
        json.dumps(
            {
                "command": "python -m benchmarks.harness.architectures",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "counts": counts,
                "equal": equal,
                "others": {name: verdict for name, verdict in verdicts.items() if name not in equal},
                "not_built": not_built,
            },
            indent=1,
        )
        + "\n"
    )


# -- building ------------------------------------------------------------------------------------------------------------------------------


def _build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        config = _config(name)
        make: Callable[..., nn.Module] = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            try:
                skeleton = make(copy.deepcopy(config))
            except Exception:  # most have no causal head; whatever else is wrong, the plain model says again
                make = AutoModel.from_config
                skeleton = make(copy.deepcopy(config))
        if (count := sum(parameter.numel() for parameter in skeleton.parameters())) > MOST:
            raise _NotBuilt(f"{count} parameters")
        torch.manual_seed(0)
        model = make(config).eval()
        inputs = _inputs(model)
        if not _outputs(model, inputs):
            raise _NotBuilt("its output holds no tensors")
    except _NotBuilt:
        raise
    except Exception as error:
        raise _NotBuilt(f"{type(error).__name__}: {str(error)[:100]}") from error
    return model, inputs


def _config(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    plain = kind()
    config = kind(**_reduced(plain))
    for field, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):  # a configuration of a part
            setattr(config, field, type(value)(**_reduced(value)))
    return config


def _reduced(config: Any) -> dict[str, Any]:
    return {field: size for field, size in _SIZES.items() if hasattr(config, field)}


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if model.main_input_name != "input_ids":
        raise _NotBuilt(f"takes {model.main_input_name}")
    decodes = model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "decoder_input_ids": ids} if decodes else {"input_ids": ids}


# -- comparing -----------------------------------------------------------------------------------------------------------------------------


def _judge(plain: nn.Module, original: nn.Module, inputs: dict[str, torch.Tensor], technique: str) -> str:
    wrapped = copy.deepcopy(original)
    try:
        if not _equal(_outputs(plain, inputs), _outputs(plain, inputs)):
            return "random: two plain forwards differ"
        _wrap(wrapped, technique)
        for call in ("first", "second"):
            if not _equal(_outputs(plain, inputs), _outputs(wrapped, inputs)):
                return f"different: {call} forward"
        if (expected := _trained(plain, inputs)) is not None and not _equal(expected, _gradients(wrapped, inputs)):
            return "different: gradients"
        tw.unwrap(wrapped)
        return "equal" if _equal(_outputs(plain, inputs), _outputs(wrapped, inputs)) else "different: after unwrap"
    except tw.TorchwrapError as error:
        return f"refused: {type(error).__name__}: {str(error)[:160]}"
    except Exception as error:
        return f"error: {type(error).__name__}: {str(error)[:160]}"


def _wrap(model: nn.Module, technique: str) -> None:
    if technique == "superpipeline":
        tw.superpipeline(model, k=1)
        return
    try:
        tw.offload(model, device_memory=1, reserve=0, params="disk")
    except tw.BudgetError as error:
        tw.offload(model, device_memory=error.needed, reserve=0, params="disk")


def _outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    with torch.no_grad():
        return list(_tensors(model(**inputs)))


def _trained(plain: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """`_gradients`; None where the plain model does not train with these inputs."""
    try:
        return _gradients(plain, inputs)
    except Exception:
        return None


def _gradients(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of a step in training mode."""
    model.train()
    try:
        torch.manual_seed(3)
        outputs = [x for x in _tensors(model(**inputs)) if x.is_floating_point() and x.requires_grad]
        loss = torch.stack([x.float().square().mean() for x in outputs]).sum()
        loss.backward()
        return [loss.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())]
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Bit for bit; random weights without training make some architectures give NaN, which equals itself here."""
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
