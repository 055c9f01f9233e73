"""What tests of superpipeline share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch that is undone before the fixtures of other tests are: what it replaces is seen by the library while models go."""
    with pytest.MonkeyPatch.context() as made:
        yield made
