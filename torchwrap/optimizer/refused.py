"""What is said when a backward or a caller wants gradients, or weights, that an update has used already, and of gradients it cannot use."""

from __future__ import annotations

from torchwrap.core import errors
from torchwrap.optimizer.targets import Target

__all__ = ["added", "cleared", "replaced", "sparse"]


def cleared(target: Target) -> errors.ConflictError:
    """Somebody cleared a gradient that was used."""
    return errors.ConflictError(
        f"OffloadedOptimizer: the gradient of {target.name} was cleared after an update had used it",
        where=target.name,
        fix="Call rollback(), or close() and load model and a new optimizer from a checkpoint. Then call step() after each backward, or "
        "pass overlap=False to be able to give gradients up.",
    )


def added(target: Target) -> errors.ConflictError:
    """A backward brings more of a gradient that was used."""
    return errors.ConflictError(
        f"OffloadedOptimizer: a backward would add to the gradient of {target.name}, which an update has used already",
        where=target.name,
        fix="Call optimizer.zero_grad() after each step; with several backwards per step, pass accumulate=N or overlap=False.",
    )


def replaced(target: Target) -> errors.ConflictError:
    """A backward goes through a model whose weights are not those its forward computed with."""
    return errors.ConflictError(
        f"OffloadedOptimizer: a second backward before step(), and the first has updated weights already, {target.name} among them",
        where=target.name,
        fix="Call step() after each backward, then the next forward. With several backwards per step, pass accumulate=N or overlap=False.",
    )


def sparse(name: str) -> errors.UnsupportedModelError:
    """A gradient has no elements in order."""
    return errors.UnsupportedModelError(
        f"OffloadedOptimizer: the gradient of {name} is sparse", where=name, fix="Build the embedding with sparse=False."
    )
