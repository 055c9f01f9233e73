"""`attend` in a forked child, where torch's threads are those of the parent and its operations wait for them for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: pytest's has threads that nobody should fork. All inputs are made by the parent, as torch hangs in the child.
CODE = """
import os, signal, time, torch
from torchwrap.attention.attend import attend
from torchwrap.attention.masks.mask import TileMask
assert torch.get_num_threads() == 2
S = 256
q, k, v = (torch.randn(1, 4, S, 64) for _ in range(3))
long = torch.randn(1, 4, 4096, 64)
ones, wide = torch.ones_like(q), [part.double() for part in (q, k, v)]
dense, bias = torch.rand(1, 4, S, S) > 0.5, torch.randn(1, 4, S, S)
leaves = [torch.randn(1, 4, S, 64, requires_grad=True) for _ in range(3)]
def gradients(**options):
    return torch.autograd.grad(attend(*leaves, mask=TileMask.causal(1, S, S), **options), leaves, ones)[0]
calls = {
    "decode": lambda: attend(q[:, :, :1], long, long),
    "causal": lambda: attend(q, k, v, mask=TileMask.causal(1, S, S)),
    "float64": lambda: attend(*wide, mask=TileMask.causal(1, S, S)),
    "eager": lambda: attend(q, k, v, backend="eager"),
    "bias": lambda: attend(q, k, v, bias=bias),
    "dense": lambda: attend(q, k, v, mask=dense),
    "rows": lambda: attend(q, long, long, need_rows=[0])[1],
    "gradients": gradients,
    "gradients, eager": lambda: gradients(backend="eager"),
}
for name, call in calls.items():
    before = call()  # on two threads
    child = os.fork()
    if not child:
        torch.testing.assert_close(call()[..., :16, :32].contiguous(), before[..., :16, :32].contiguous())
        os._exit(0 if torch.get_num_threads() == 2 else 2)
    end = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.005)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise SystemExit(name + " hangs")
    assert done[1] == 0, name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_attends_as_its_parent_does() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
