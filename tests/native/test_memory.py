"""Attention of many queries takes no more memory than torch's own, and its gradients none that grows with the batch; by counters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from torchwrap import native
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.cpu.prefill import refuses
from torchwrap.attention.masks.mask import TileMask
from torchwrap.native.library import most_bytes

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOKENS = 1024


@pytest.fixture(autouse=True)
def _two_threads() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def allocated(run: Callable[[], object]) -> int:
    """Bytes of torch's tensors, at the moment when they are most, and those of the kernels, at theirs."""
    run()
    most_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0)) + most_bytes()


def tensors(dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, heads, TOKENS, 64).to(dtype).requires_grad_() for heads in (9, 3, 3)]


@DTYPES
def test_a_call_takes_no_more_than_torch_s(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    mask = TileMask.causal(1, TOKENS, TOKENS)
    if (why := refuses(checked(q, k, v, mask=mask))) is not None:
        pytest.skip(why)
    forms = {
        "ours": lambda: attend(q, k, v, mask=mask),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    with torch.no_grad():
        taken = {name: allocated(form) for name, form in forms.items()}
    assert q.nbytes < taken["ours"] <= taken["torch"]
    grad = torch.randn_like(q)
    taken = {name: allocated(lambda form=form: torch.autograd.grad(form(), (q, k, v), grad)) for name, form in forms.items()}
    assert 2 * q.nbytes < taken["ours"] <= taken["torch"]


@DTYPES
def test_a_larger_batch_takes_larger_results_and_nothing_else(dtype: torch.dtype) -> None:
    found = {}
    for batch in (2, 6):
        q, k, v = tensors(dtype, batch)
        out, lse = native.prefill(q, k, v, scale=0.125)
        most_bytes()
        native.gradients(q, k, v, out, lse, torch.ones_like(out), scale=0.125)
        found[batch] = most_bytes()
    assert found[6] <= found[2] + 2**16  # tables: a few numbers for each block of keys
