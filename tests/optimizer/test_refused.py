"""What an optimizer refuses for a disk that is full leaves it as it was."""

from __future__ import annotations

import copy
import errno
import os

import pytest
import torch

import torchwrap as tw
from tests.optimizer.optimizing import differences, pair, trained
from torchwrap import OffloadedOptimizer
from torchwrap.storage.backend import Backend


class _Full:
    """Makes the disk full until it is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __enter__(self) -> None:
        def reserve(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self._monkeypatch.setattr(Backend, "reserve", reserve)

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()


def test_state_for_which_there_is_no_room_leaves_settings_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.Adam, lr=1e-2, chunk=8192)
    other = copy.deepcopy(plain)
    larger = torch.optim.Adam(other.parameters(), lr=1e-3, amsgrad=True)
    trained(other, larger, range(1))
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2))
    with _Full(monkeypatch), pytest.raises(tw.StorageError, match="No space"):
        optimizer.load_state_dict(larger.state_dict())
    assert differences(plain, reference, model, optimizer) == []
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2, 4))
    assert differences(plain, reference, model, optimizer) == []
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.load_state_dict(copy.deepcopy(larger.state_dict()))
        trained(net, opt, range(4, 6))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


def test_parameters_for_which_there_is_no_room_are_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair(wide=False)
    early = [[*net.blocks[0].parameters(), *net.blocks[1].parameters()] for net in (plain, model)]
    reference = torch.optim.Adam(early[0], lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.Adam, params=early[1], lr=1e-2, chunk=8192)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2))
    late = [{"params": list(net.blocks[2].parameters()), "lr": 1e-3} for net in (plain, model)]
    with _Full(monkeypatch), pytest.raises(tw.StorageError, match="No space"):
        optimizer.add_param_group(dict(late[1]))
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2, 4))
        net.zero_grad()
    assert differences(plain, reference, model, optimizer) == []
    for net, opt, group in ((plain, reference, late[0]), (model, optimizer, late[1])):
        opt.add_param_group(group)
        trained(net, opt, range(4, 6))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()
