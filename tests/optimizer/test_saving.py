"""`state_dict()` in another thread, or from a hook, while a model is trained: training goes on with its own bits."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_saving_while_a_block_computes(moment: str) -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, chunk=8192, overlap=False)
    saved: list[dict[str, torch.Tensor]] = []

    def save(*_: object) -> None:
        thread = threading.Thread(target=lambda: saved.append({k: v.clone() for k, v in model.state_dict().items()}))
        thread.start()
        thread.join(20)

    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(1))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    up = model.blocks[1].up
    if moment == "forward":
        up.register_forward_pre_hook(save)
    else:
        up.register_forward_hook(lambda *args: args[2].register_hook(save) and None)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(1, 2))
    assert differences(plain, reference, model, optimizer) == []
    assert len(saved) == 1
    assert all(torch.equal(saved[0][name], value) for name, value in before.items())
    optimizer.close()


def test_saving_all_the_time() -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, chunk=8192)
    over, failed = threading.Event(), []

    def save() -> None:
        while not over.is_set():
            try:
                state = model.state_dict()
            except Exception as error:
                failed.append(error)
            else:
                failed.extend(name for name, value in state.items() if value.isnan().any())

    thread = threading.Thread(target=save)
    thread.start()
    try:
        losses = trained(model, optimizer, range(4))
    finally:
        over.set()
        thread.join()
    assert losses == trained(plain, reference, range(4))
    assert failed == []
    assert differences(plain, reference, model, optimizer) == []
    assert loss_of(model, 9).item() == loss_of(plain, 9).item()
    optimizer.close()
