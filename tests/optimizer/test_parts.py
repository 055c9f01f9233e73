"""Computing in chunks gives the bits of computing the whole, for every class, type, length, number of threads and place of the cuts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.pairs import every_two
from torchwrap.optimizer.elementwise import Rule, settings_of
from torchwrap.optimizer.parts import Whole, run

CLASSES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "fused": True}),  # with momentum see test_rules.py
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adagrad, {"fused": True}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    (torch.optim.NAdam, {}),
    (torch.optim.ASGD, {}),
]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@every_two(
    rule={f"{cls.__name__}-{'-'.join(options)}": (cls, options) for cls, options in CLASSES},
    dtype={"fp32": torch.float32, "bf16": torch.bfloat16},
    numel={str(numel): numel for numel in (129, 32769, 100_003)},
)
def test_chunks_give_the_bits_of_the_whole(
    rule: tuple[type[torch.optim.Optimizer], dict[str, Any]], dtype: torch.dtype, numel: int, threads: int
) -> None:
    cls, options = rule
    generator = torch.Generator().manual_seed(numel)
    start = torch.randn(numel, generator=generator).to(dtype)
    plain = start.clone()
    reference = cls([plain], **options)
    steps = Rule(cls, options)
    settings = settings_of(steps.template.param_groups[0])
    layout = steps.layout(settings, dtype, torch.device("cpu"))
    weight = start.clone()
    state = {name: torch.empty(numel, dtype=kept) for name, kept in layout.items()}
    numbers: dict[str, Any] = {}
    whole = Whole(numel, threads, ranged=not options.get("fused"), plain=False)
    for step in range(3):
        gradient = torch.randn(numel, generator=generator).to(dtype)
        plain.grad = gradient
        reference.step()
        chunk, after = 4096 * 3 + 2, {}  # cuts anywhere
        for first in range(0, numel, chunk):
            last = min(numel, first + chunk)
            buffers = {name: torch.zeros(chunk, dtype=tensor.dtype) for name, tensor in (("w", weight), *state.items())}
            buffers["w"][: last - first] = weight[first:last]
            for name, tensor in state.items():
                buffers[name][: last - first] = tensor[first:last]
            kept = {name: buffers[name] for name in state}
            after = run(steps, settings, whole, (first, last), buffers["w"], gradient[first:last], kept, numbers, begun=step > 0)
            weight[first:last] = buffers["w"][: last - first]
            for name in state:
                state[name][first:last] = buffers[name][: last - first]
        numbers = after
    assert torch.equal(weight, plain)
    for name, value in reference.state[plain].items():
        got = state[name] if name in state else numbers[name]
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(value)), name


def test_plain_cuts_would_not_do() -> None:
    """The fact that parts.py is about: if this fails, it may be deleted."""
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()

    def stepped(*cuts: tuple[int, int]) -> torch.Tensor:
        weight = start.clone()
        for first, last in cuts:
            weight[first:last].add_(gradient[first:last], alpha=-0.1)
        return weight

    assert not torch.equal(stepped((0, 1000)), torch.cat([stepped((i, i + 1))[i : i + 1] for i in range(1000)]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("length", [1, 127, 128, 32768, 32769, 99_999, 4 << 20])
def test_lengths_go_through_registers_entirely(length: int, count: int) -> None:
    whole = Whole(length, count, ranged=True, plain=False)
    filled = whole.filled(length)
    even = whole.even(length)
    assert length - 128 * (count + 1) < even <= length <= filled <= length + 256 * (count + 1)
    for computed in (even, filled):
        workers = max(1, min(count, -(-computed // 32768)))
        assert computed % (128 * workers) == 0
