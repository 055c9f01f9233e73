"""Steps of training that streamed and plain models take alike, and comparisons of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import torchwrap as tw
from torchwrap.core import tensors

__all__ = ["Blocks", "Expert", "OutsideAdamW", "at_rest", "different_gradients", "loss_of", "with_adapters"]


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A scalar of the first floating tensor that the model returns."""
    output = model(**inputs)
    found = output if isinstance(output, torch.Tensor) else next(v for v in output.values() if isinstance(v, torch.Tensor))
    return found.float().square().mean()


def different_gradients(model: nn.Module, plain: nn.Module) -> list[str]:
    """Names of parameters whose gradients differ in a bit, or that only one of the two models has."""
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert any(gradient is not None for gradient in expected.values())
    assert expected.keys() == dict(model.named_parameters()).keys()

    def same(got: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
        return (got is None and wanted is None) or (got is not None and wanted is not None and torch.equal(got, wanted))

    return [name for name, parameter in model.named_parameters() if not same(parameter.grad, expected[name])]


def at_rest(model: nn.Module) -> None:
    """No slot is in use or lost, there are no more than planned, and every streamed parameter shows its placeholder."""
    handle = tw.handle_of(model, "offload")
    engine = handle.engine
    assert engine is not None
    assert not any(fetch.bound for fetch in engine._fetches.values())
    taken = [id(fetch.slot) for fetch in engine._fetches.values()]
    free = [id(slot) for slot in engine._free]
    assert len({*taken, *free}) == len(taken) + len(free) == len(engine._slots) <= handle.plan.slots
    assert all(piece.parameter.data_ptr() == piece.absent.data_ptr() for piece in handle.pieces if not piece.resident)


def with_adapters(model: nn.Module) -> Any:
    """The model with low-rank adapters of peft's in it, the same every time; needs peft."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return peft.get_peft_model(model, config)


class OutsideAdamW:
    """AdamW on copies of a model's weights; what it makes of them is put back through `torchwrap.core.tensors`."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        names = [name for name, _ in model.named_parameters()]
        with tensors(model, *names) as real:
            self.copies = {name: nn.Parameter(real[name].clone()) for name in names}
        self.optimizer = torch.optim.AdamW(self.copies.values(), **options)

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.copies[name].grad = parameter.grad
        self.optimizer.step()
        with tensors(self.model, *self.copies, write=True) as real:
            for name, copy in self.copies.items():
                real[name].copy_(copy.data)


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.up(x).relu())
        return y


class _Routed(nn.Module):
    """A block whose experts are modules of their own, each called with the tokens routed to it. x: (T, C) float."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.mix, self.gate = nn.Linear(width, width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.mix(x))
        weight, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, rank = (chosen == index).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weight[token, rank, None])
        return x + out


class Blocks(nn.Module):
    """An embedding and a head large enough to be streamed, around blocks with experts; `around` may call them in its own way."""

    def __init__(self, *, vocabulary: int = 8192, width: int = 32, depth: int = 3, experts: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=3)
        self.layers = nn.ModuleList(_Routed(width, experts) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.around: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda block, x: block(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.layers:
            x = self.around(block, x)
        logits: torch.Tensor = self.head(x)
        return logits

    @classmethod
    def pair(cls, **options: Any) -> Iterator[Blocks]:
        """Two with equal weights, in training mode."""
        for _ in range(2):
            torch.manual_seed(7)
            yield cls(**options).train()
