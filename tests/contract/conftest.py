"""Fixtures of the contract suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from other tests, and none left for them."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
