"""Torch's kernels, FlexAttention and flash-attn as back ends on a card, and the dispatcher's measurements there.

Law: out and lse at most twice the error of the textbook formula in the dtype of the inputs, gradients at most three times, which is the
rule of flash-attention's own tests. A back end that a card or an installation lacks is skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.triton_cases import textbook
from tests.gpu.test_attention import call
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call
from torchwrap.attention.dispatch import backend, choose, order
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.settings import Settings
from torchwrap.attention.tune import Shape, tune

KERNELS = ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "flash_attn", "flex", "sdpa")
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "everything": lambda: {},
    "causal": lambda: {"mask": TileMask.causal(2, 500, 500, device="cuda")},
    "causal, last corner": lambda: {"rows": 77, "mask": TileMask.causal(2, 77, 500, device="cuda")},
    "causal, dead rows": lambda: {"columns": 77, "mask": TileMask.causal(2, 500, 77, device="cuda")},
    "causal, first corner": lambda: {"rows": 77, "mask": TileMask.causal(2, 77, 500, q_offset=0, device="cuda")},
    "window": lambda: {"mask": TileMask.window(2, 500, 500, 90, device="cuda")},
    "both ways": lambda: {"mask": TileMask(1, 500, 500, left=70, right=20, device="cuda")},
    "padded": lambda: {"mask": TileMask.padded([333, 0], 500, 500, device="cuda")},
    "sinks": lambda: {"mask": TileMask.causal(2, 500, 500, device="cuda"), "sinks": True},
    "decode": lambda: {"rows": 1, "columns": 3001},
    "odd width": lambda: {"rows": 130, "columns": 130, "width": 76},
    "one head each": lambda: {"heads": 4, "kv_heads": 4, "mask": TileMask.causal(2, 500, 500, device="cuda")},
}


FLOOR = 2e-5
"""What float32 kernels differ by from the formula whatever the law says: they add in other orders, some by three TF32 products."""


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Greatest difference; NaN where only one has it, which no law allows."""
    same = (found.double() == exact) | (found.isnan() & exact.isnan())
    return float((found.double() - exact).abs().masked_fill(same, 0).max())


def allowed(usual: torch.Tensor, exact: torch.Tensor, factor: int) -> float:
    return factor * float((usual.double() - exact).abs().nan_to_num(posinf=0).max()) + FLOOR


def able(name: str, given: Call) -> Any:
    found = backend(name)
    reason = found.refuses(given)
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_result_and_gradients_obey_the_error_law(name: str, case: str, dtype: torch.dtype) -> None:
    given = call(dtype=dtype, **CASES[case]())
    found = able(name, given)
    out, lse = found.forward(given)
    grad_out, none = torch.randn_like(out), torch.zeros_like(lse)
    exact, usual = (textbook(given, wide, grad_out, none) for wide in (torch.float64, dtype))
    dead = exact[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, dead) and not out[dead].any()
    assert error(out, exact[0]) <= allowed(usual[0], exact[0], 2)
    assert error(lse, exact[1]) <= allowed(usual[1], exact[1], 2)
    grads = dict(zip(("q", "k", "v", "sinks"), found.backward(given, out, lse, grad_out, None), strict=False))
    for part, expected in exact[2].items():
        assert error(grads[part], expected) <= allowed(usual[2][part], expected, 3), part


@pytest.mark.parametrize("name", KERNELS)
def test_a_gradient_of_lse_arrives(name: str) -> None:
    given = call(200, 200, mask=TileMask.causal(2, 200, 200, device="cuda"))
    found = able(name, given)
    out, lse = found.forward(given)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    exact, usual = (textbook(given, dtype, grad_out, grad_lse) for dtype in (torch.float64, torch.float16))
    for part, ours in zip("qkv", found.backward(given, out, lse, grad_out, grad_lse), strict=False):
        assert error(ours, exact[2][part]) <= allowed(usual[2][part], exact[2][part], 3)


def test_flash_says_of_a_bias_and_flex_takes_it() -> None:
    given = call(bias=(1, 6, 500, 500))
    object.__setattr__(given, "bias", given.bias.detach() if given.bias is not None else None)
    assert "bias" in str(backend("sdpa-flash").refuses(given))
    out, _ = able("flex", given).forward(given)
    expected = attend(given.q.double(), given.k.double(), given.v.double(), bias=given.bias, backend="eager")
    assert (out - expected).abs().max() < 5e-3


def test_the_shipped_order_is_that_of_the_card() -> None:
    dense = call(mask=TileMask.causal(2, 500, 500, device="cuda"))
    first, capability = order(dense, Settings(tune="off"))[0], torch.cuda.get_device_capability()
    assert first == ("sdpa-cudnn" if (9, 0) <= capability < (11, 0) else "sdpa-flash" if capability >= (8, 0) else "sdpa-efficient")
    chosen = choose(dense, Settings(tune="off"))
    out, _ = chosen.backend.forward(dense)
    assert (out - attend(dense.q, dense.k, dense.v, mask=dense.mask, backend="eager")).abs().max() < 5e-3


def test_a_kind_is_measured_on_first_use_and_kept(tmp_path: Path) -> None:
    given, settings = call(mask=TileMask.causal(2, 500, 500, device="cuda")), Settings(tune="measure", tune_dir=str(tmp_path / "figures"))
    attend(given.q, given.k, given.v, mask=given.mask, backend=settings)
    assert "measured here" in choose(given, settings).reason
    assert len(list((tmp_path / "figures").glob("*.json"))) == 1


def test_nothing_is_measured_while_launches_are_recorded(tmp_path: Path) -> None:
    given, settings = call(1, 4096, batch=1), Settings(tune="measure", tune_dir=str(tmp_path / "figures"))
    attend(given.q, given.k, given.v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(given.q, given.k, given.v, backend=settings)
    assert not (tmp_path / "figures").exists()


def test_tuning_ahead_compares_ours_with_torchs(tmp_path: Path) -> None:
    shape = Shape(heads=8, kv_heads=2, width=64, q_length=512, kv_length=512, dtype=torch.float16, device="cuda")
    found = tune([shape], train=True, tune_dir=str(tmp_path / "figures"))
    assert len(found) == 2 and all(one.order[:1] and len(one.seconds) > 1 for one in found)
