"""Five steps of `OffloadedOptimizer` on a streamed model of every family: each loss, gradient, weight and state is that in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.models import by_name
from tests.optimizer.optimizing import differences
from tests.weights.budgets import streamed
from tests.weights.training import loss_of, with_adapters
from torchwrap.core.errors import StorageError

FAMILIES = ("llama", "llama-tied", "qwen2", "mixtral", "gpt2", "t5", "bert", "albert", "vit")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 8192
ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


class Setting(NamedTuple):
    """How gradients are used: `clip` is a total norm, `accumulate` backwards per step."""

    clip: float | None
    accumulate: int
    gradients: str
    overlap: bool = True


SETTINGS = {
    "during-backward": Setting(None, 1, "auto"),
    "accumulated": Setting(None, 3, "auto"),
    "clipped": Setting(0.5, 2, "auto"),
    "clipped-on-disk": Setting(0.5, 2, "disk"),
    "kept": Setting(0.5, 2, "host", overlap=False),
}


def _cases() -> Iterator[Any]:
    """Of the 90 there are, 36: each family meets four of the five settings, two in each type."""
    names = list(SETTINGS)
    for i, family in enumerate(FAMILIES):
        for j, dtype in enumerate(DTYPES):
            for k in range(2):
                setting = names[(i + 2 * j + k) % len(names)]
                yield pytest.param(family, dtype, setting, id=f"{family}-{dtype}-{setting}")


def unequal(plain: nn.Module, model: nn.Module, compute: Callable[[nn.Module, int], torch.Tensor], how: Setting, adam: Any) -> list[str]:
    """What is not equal in every bit after five steps on each: a loss, a gradient of some backward, a weight, an entry of the state."""
    losses: list[list[torch.Tensor]] = [[], []]
    seen: list[dict[str, list[torch.Tensor]]] = [{}, {}]
    for each, kept in zip((plain, model), seen, strict=True):
        for name, parameter in each.named_parameters():
            if parameter.requires_grad:  # before anybody takes them
                parameter.register_hook(partial(_keep, kept.setdefault(name, [])))
    reference = torch.optim.AdamW(filter(_trains, plain.parameters()), **adam)
    optimizer = tw.OffloadedOptimizer(
        model, torch.optim.AdamW, params=list(filter(_trains, model.parameters())), max_grad_norm=how.clip, accumulate=how.accumulate,
        gradients=how.gradients, overlap=how.overlap, chunk=65536, **adam,
    )  # fmt: skip
    try:
        for each, driver, found in zip((plain, model), (reference, optimizer), losses, strict=True):
            for step in range(5):
                driver.zero_grad()
                for micro in range(how.accumulate):
                    torch.manual_seed(10 * step + micro)  # dropout
                    loss = compute(each, 10 * step + micro)
                    loss.backward()
                    found.append(loss.detach())
                if each is plain and how.clip is not None:
                    nn.utils.clip_grad_norm_(plain.parameters(), how.clip)
                driver.step()
        assert len({loss.item() for loss in losses[0]}) > 1 and any(gradient.any() for kept in seen[0].values() for gradient in kept)
        wrong = [f"loss {n}" for n, (a, b) in enumerate(zip(*losses, strict=True)) if not torch.equal(a, b)]
        for name, wanted in seen[0].items():
            got = seen[1][name]
            if len(got) != len(wanted) or not all(map(torch.equal, got, wanted)):
                wrong.append(f"gradient of {name}")
        return wrong + differences(plain, reference, model, optimizer)
    finally:
        optimizer.close()


def _keep(into: list[torch.Tensor], gradient: torch.Tensor) -> None:
    into.append(gradient.clone())


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


@pytest.mark.parametrize(("family", "dtype", "setting"), list(_cases()))
def test_five_steps_are_those_in_memory(family: str, dtype: str, setting: str) -> None:
    fixture = by_name(family)
    plain, model = (fixture.build().to(DTYPES[dtype]).train() for _ in range(2))
    inputs = {name: value.to(DTYPES[dtype]) if value.is_floating_point() else value for name, value in fixture.inputs().items()}
    assert unequal(plain, streamed(model), lambda each, number: loss_of(each, inputs), SETTINGS[setting], ADAM) == []


@pytest.mark.parametrize("setting", ["during-backward", "kept"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_a_streamed_base(dtype: str, setting: str) -> None:
    pytest.importorskip("peft")
    fixture = by_name("llama")
    plain, model = (fixture.build().to(DTYPES[dtype]).train() for _ in range(2))
    plain, model = with_adapters(plain).to(DTYPES[dtype]), with_adapters(streamed(model)).to(DTYPES[dtype])
    assert unequal(plain, model, lambda each, number: loss_of(each, fixture.inputs()), SETTINGS[setting], ADAM) == []


class _Quantised(nn.Module):
    """A frozen weight of one byte per element with a scale, and an adapter that is trained."""

    def __init__(self, dtype: torch.dtype, width: int = 256) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(width, width) * 8).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.full((width,), 0.01), requires_grad=False)
        self.adapter = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None]) + self.adapter(x)


@pytest.mark.parametrize("offload", [{"params": "disk"}, {}, None], ids=["disk", "resident", "plain"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_adapters_over_quantised_weights(dtype: torch.dtype, offload: dict[str, Any] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(_Quantised(dtype) for _ in range(3))).train()
    model, again = copy.deepcopy(plain), copy.deepcopy(plain)
    if offload is not None:
        model, again = (tw.offload(each, units=("0", "1", "2"), **offload) for each in (model, again))
    x = torch.linspace(-1, 1, 1024).view(4, 256)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, path=tmp_path / "run")

    def step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()

    step(plain, reference)
    step(model, optimizer)
    optimizer.commit()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()
    optimizer = tw.OffloadedOptimizer(again, torch.optim.AdamW, lr=1e-2, path=tmp_path / "run")
    step(plain, reference)
    step(again, optimizer)
    assert differences(plain, reference, again, optimizer) == []
    optimizer.close()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trained weights of SmolLM2: its first blocks, and the rows of its embedding and head for the first tokens."""
    transformers = pytest.importorskip("transformers")
    from torchwrap.demo import weights

    try:
        folder = weights.smollm2()
    except StorageError as error:
        pytest.skip(str(error))
    made = tmp_path_factory.mktemp("smollm2")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    whole.model.layers = whole.model.layers[:2]
    whole.config.num_hidden_layers = 2
    whole.config.layer_types = None
    whole.resize_token_embeddings(TOKENS)
    whole.save_pretrained(made)
    return made


@pytest.mark.parametrize(("dtype", "setting"), [("bf16", "clipped"), ("fp32", "during-backward")])
def test_trained_weights_of_smollm2(dtype: str, setting: str, smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=DTYPES[dtype]).train()
    model = tw.offload.from_pretrained(smollm2, dtype=DTYPES[dtype], params="disk").train()

    def compute(each: nn.Module, number: int) -> torch.Tensor:
        ids = torch.randint(0, TOKENS, (1, 16), generator=torch.Generator().manual_seed(number))
        loss: torch.Tensor = each(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    assert unequal(plain, model, compute, SETTINGS[setting], {"lr": 2e-5, "fused": True}) == []
