"""The live object of an applied `fast_attention`: which calls went where, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torchwrap.attention.cache import ArenaPlan
from torchwrap.attention.cooperative.planner import Plan
from torchwrap.attention.service import Service
from torchwrap.attention.settings import settings_of
from torchwrap.core.errors import ConfigError, ConflictError, UnsupportedModelError
from torchwrap.core.integration import AttentionRoute
from torchwrap.core.technique import Handle

__all__ = ["FastAttentionHandle"]


class FastAttentionHandle(Handle):
    """Attention of one model; `tw.handle_of(model, "fast_attention")` returns it."""

    def __init__(self, service: Service, routes: list[AttentionRoute]) -> None:
        self.service: Service = service
        self._routes = routes

    def stats(self) -> dict[str, Any]:
        """`{"served": {...}, "left": {...}}`: calls by module, back end and kind; those inside compiled graphs are not counted."""
        return self.service.stats()

    def explain(self) -> str:
        """A line per back end and kind of call, with why it was chosen; then what went to the model's own attention, and why."""
        return self.service.explain() or "No call yet."

    def plan(self, *, tokens: int, batch: int = 1) -> Plan | ArenaPlan:
        """What the model's cache takes for such a sequence: bytes on device and host, and with a cooperative cache where they lie.

        Args:
            tokens: of a sequence, prompt and answer together.
            batch: sequences at a time; beams count.

        Raises:
            ConfigError: fewer than one of either.
            PlanError: a cooperative cache fits nowhere; the message has the numbers.
            UnsupportedModelError: the model has no growing cache.
        """
        if not (isinstance(tokens, int) and isinstance(batch, int)) or tokens < 1 or batch < 1:
            raise ConfigError(f"a cache of {batch!r} sequences of {tokens!r} tokens", where="plan", fix="Give at least 1 of each.")
        for route in self._routes:
            found: Plan | ArenaPlan | None = route.plan(tokens, batch)
            if found is not None:
                return found
        raise UnsupportedModelError(
            "no part of this model generates with a growing cache", where="plan", fix="Only language models have one to plan."
        )

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Within the block a kind of call that was never measured on this machine is measured when it comes; what is found is kept.

        Raises:
            ConfigError: the settings name a back end, so that there is nothing to choose.
        """
        before = self.service.backend
        settings = settings_of(before)
        if settings.backend != "auto":
            raise ConfigError(
                f"backend={settings.backend!r} leaves nothing to choose", where="tuning", fix='Wrap the model with backend="auto".'
            )
        self.service.backend = replace(settings, tune="measure")
        try:
            yield
        finally:
            self.service.backend = before

    def open(self) -> None:
        """Lead the model's attention here."""
        for route in self._routes:
            route.set()

    def close(self) -> None:
        """Lead the model's attention back.

        Raises:
            ConflictError: the model is at work in a way that would go on without it; nothing is undone.
        """
        for reason in filter(None, (route.busy() for route in self._routes)):
            raise ConflictError(f"fast_attention cannot be undone now: {reason}", fix="Stop that first (`manager.stop()`).")
        for route in self._routes:
            route.restore()
