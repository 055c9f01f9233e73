"""The back end "flash_attn": the package flash-attn, where it is installed.

It is built for one torch, one CUDA and cards from 8.0, so it is nobody's dependency: it is imported when it is first asked for. Its own
merits over torch's flash kernel, which is the same algorithm, are softcap and newer versions. Bands lie at the last query and the last
key; query heads share key heads without copies.
Source: T. Dao, "FlashAttention-2", 2023; flash-attn 2.7, `flash_attn_func` and `_flash_attn_backward` of `flash_attn_interface`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.torch_kernels.card import CardKernel, filled, on_card
from torchwrap.attention.torch_kernels.flash import band, laid_out, no_band

__all__ = ["FlashAttn"]

OLDEST = (2, 7)
"""Version from which backward takes both sides of a window by name."""
WIDEST = 256


class FlashAttn(CardKernel):
    """`flash_attn.flash_attn_func` and its backward.

    Cost: nothing beyond the results; keys and values are filled up where widths differ or are no multiple of 8.
    """

    name = "flash_attn"

    def refuses(self, call: Call) -> str | None:
        """The first check that fails, with its value; None: the call can run."""
        missing = _missing()
        if missing is not None:
            return missing
        elsewhere = on_card(call)
        if elsewhere is not None:
            return elsewhere
        capability = torch.cuda.get_device_capability(call.q.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}, and flash-attn is for cards from 8.0"
        if call.q.dtype not in (torch.float16, torch.bfloat16):
            return f"{call.q.dtype}, and flash-attn computes float16 and bfloat16"
        if max(call.width, call.value_width) > WIDEST:
            return f"vectors of {max(call.width, call.value_width)} elements, and flash-attn takes at most {WIDEST}"
        if call.dropout:
            return f"dropout={call.dropout}: flash-attn would draw other weights than the contract's"
        if call.bias is not None:
            return "a bias, which flash-attn does not have"
        return no_band(call)

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """One call of the package."""
        q, k, v = laid_out(call)
        causal, window = _band(call)
        out, lse, _ = _package().flash_attn_func(
            q, k, v, softmax_scale=call.scale, causal=causal, window_size=window, softcap=call.softcap or 0.0, return_attn_probs=True
        )
        return out.narrow(-1, 0, call.value_width).transpose(1, 2), lse

    def run_backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One call of the package's backward, with out and lse of the whole call, which its public function has no arguments for."""
        q, k, v = laid_out(call)
        out, grad_out = (filled(tensor, q.shape[3]).transpose(1, 2) for tensor in (out, grad_out))
        causal, (left, right) = _band(call)
        dq, dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
        _package()._flash_attn_backward(
            grad_out, q, k, v, out, lse.contiguous(), dq, dk, dv, dropout_p=0.0, softmax_scale=call.scale, causal=causal,
            window_size_left=left, window_size_right=right, softcap=call.softcap or 0.0, alibi_slopes=None,
            deterministic=self.deterministic, rng_state=None,
        )  # fmt: skip
        dq, dk, dv = (grad.transpose(1, 2) for grad in (dq, dk, dv))
        return dq.narrow(-1, 0, call.width), dk.narrow(-1, 0, call.width), dv.narrow(-1, 0, call.value_width)


def _band(call: Call) -> tuple[bool, tuple[int, int]]:
    causal, options = band(call)
    left, right = options["window_size_left"], options["window_size_right"]
    return causal, (-1 if left is None else left, -1 if right is None else right)


@functools.cache
def _package() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    try:
        version = str(importlib.import_module("flash_attn").__version__)
        _package()
    except (ImportError, OSError, AttributeError) as error:  # built for another torch or CUDA
        return f"the package flash-attn cannot be imported: {error}"
    known = tuple(int(part) for part in version.split(".")[:2])
    return None if known >= OLDEST else f"flash-attn is {version}, and {OLDEST[0]}.{OLDEST[1]} is the oldest whose backward is known here"
