"""What is on a model and what it costs: `describe`, and `check` for what would be.

Bytes are counted by walking the distinct storages behind parameters and buffers (a shared one once), or taken from the technique that
places them. FLOPs are counted by torch's own counter when inputs are given. A report is a list of plain rows; printing is separate.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchwrap.core.config import Config, format_bytes
from torchwrap.core.order import PHASE_NAMES, foreign_mechanisms
from torchwrap.core.swap import is_dormant, original_class
from torchwrap.core.technique import Applied, Place, Technique, as_configs, technique_named
from torchwrap.core.tensors import storage_key, tensor_bytes
from torchwrap.core.transaction import disabled, inner_model, prepare_all, records_of, skipped_of, wrappers_of

__all__ = ["Report", "Row", "check", "describe"]

WIDTH = 100
TIERS = ("device", "host", "disk")


@dataclass(kw_only=True)
class Row:
    """One technique on a model; the row of the model itself has the name of its class.

    Attributes:
        technique: its name.
        version: of the technique; 0 for the model itself.
        phase: name of its phase.
        modules: how many modules it stands on.
        first: names of the first of them.
        slot: `inside`, `outside` or both.
        device: bytes of weights on the computing device (RAM on a machine without another).
        host: bytes in RAM beside a device.
        disk: bytes in files.
        moved: bytes moved between tiers per forward; `None` if it moves nothing.
        flops_before: of one forward without the technique, if inputs were given.
        flops_after: with it.
        graph_breaks: calls at which a compiled graph is interrupted.
        exactness: bit-identical, allclose or lossy, with the present setting.
        config: settings.
        notes: remarks.
    """

    technique: str
    version: int = 0
    phase: str = ""
    modules: int = 0
    first: list[str] = field(default_factory=list)
    slot: str = ""
    device: int = 0
    host: int = 0
    disk: int = 0
    moved: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None
    graph_breaks: int = 0
    exactness: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Report:
    """Rows and remarks; prints as a table of 100 columns.

    Attributes:
        rows: the model first, then techniques, outermost first.
        dormant: modules that keep a pass-through class because something builds on it.
        foreign: mechanisms of other libraries that were seen.
        skipped: techniques left out by `apply(strict=False)`, with the reason.
        problems: for `check`: why configs would be refused.
    """

    rows: list[Row] = field(default_factory=list)
    dormant: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [_line(_HEADER), "-" * WIDTH, *(_line(_cells(row)) for row in self.rows)]
        for title, text in self._remarks():
            lines += textwrap.wrap(f"{title}: {text}", WIDTH, subsequent_indent="  ", break_long_words=True)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.rows)
        head = "".join(f"<th>{name}</th>" for name in _HEADER)
        remarks = "".join(f"<li>{html.escape(title)}: {html.escape(text)}</li>" for title, text in self._remarks())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" + (f"<ul>{remarks}</ul>" if remarks else "")

    def _remarks(self) -> list[tuple[str, str]]:
        remarks = [(row.technique, f"stands on: {_places(row)}") for row in self.rows if row.first]
        remarks += [(row.technique, f"exactness: {row.exactness}") for row in self.rows if row.exactness]
        remarks += [
            (row.technique, f"FLOPs per forward {row.flops_before:,} before, {row.flops_after:,} after")
            for row in self.rows
            if row.flops_before is not None and row.flops_after is not None
        ]
        remarks += [(row.technique, note) for row in self.rows for note in row.notes]
        remarks += [("dormant class", name) for name in self.dormant]
        remarks += [("foreign", text) for text in self.foreign]
        remarks += [(f"skipped {name}", reason) for name, reason in self.skipped.items()]
        return remarks + [("refused", text) for text in self.problems]


def describe(model: nn.Module, *, inputs: Any = None) -> Report:
    """What is on the model: techniques, where, bytes per tier, graph breaks, exactness.

    Args:
        model: wrapped or not, or its outer wrapper.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments; with it, FLOPs are counted by running the model
            once without and once with each technique.

    Example:
        >>> import torch, torchwrap as tw
        >>> model = tw.trace(torch.nn.Linear(2, 2))
        >>> [row.technique for row in tw.describe(model).rows]
        ['Linear', 'trace']
    """
    root = inner_model(model)
    records = records_of(root)
    rows = [_model_row(root, list(records.values()))]
    for name in wrappers_of(root):
        record = records[name]
        row = _row(technique_named(name), record.config, record.places, record.notes)
        _place_bytes(row, record)
        rows.append(row)
    if inputs is not None:
        rows[0].flops_before = rows[0].flops_after = None
        for row in rows[1:]:
            row.flops_after = _flops(root, inputs)
            with disabled(root, row.technique):
                row.flops_before = _flops(root, inputs)
    return Report(
        rows=rows,
        dormant=[name or "(the model)" for name, module in root.named_modules() if is_dormant(module)],
        foreign=_foreign(root),
        skipped=dict(skipped_of(root)),
    )


def check(model: nn.Module, inputs: Any = None, *, configs: Config | Sequence[Config]) -> Report:
    """What `apply` would do, without touching the model: places, estimated bytes, and why configs would be refused.

    Args:
        model: wrapped or not, or its outer wrapper.
        inputs: as for `describe`; FLOPs of the model as it is are counted.
        configs: a config or several.

    Raises:
        ConfigError: one of them is no config.
    """
    root = inner_model(model)
    report = Report(rows=[_model_row(root, list(records_of(root).values()))], foreign=_foreign(root))
    prepared = prepare_all(root, as_configs(configs), on_error=lambda config, error: report.problems.append(f"{config.technique}: {error}"))
    for technique, plan in prepared:
        report.rows += plan.rows or [_row(technique, plan.config, plan.layers, plan.notes)]
    if inputs is not None:
        report.rows[0].flops_before = _flops(root, inputs)
    return report


def _row(technique: Technique[Any], config: Config, places: Sequence[Place], notes: Sequence[str]) -> Row:
    broken = {id(module) for _, module, layer in places if not layer.traceable}
    return Row(
        technique=technique.name,
        version=technique.version,
        phase=PHASE_NAMES.get(technique.phase, str(technique.phase)),
        modules=len({id(module) for _, module, _ in places}),
        first=list(dict.fromkeys(fqn or "(the model)" for fqn, _, _ in places))[:3],
        slot="+".join(sorted({layer.where for _, _, layer in places})),
        graph_breaks=len(broken),
        exactness=next((layer.exactness for _, _, layer in places if layer.exactness), technique.exactness),
        config=config.to_dict(machine=True),
        notes=list(notes),
    )


def _place_bytes(row: Row, record: Applied) -> None:
    tiers = record.handle.tiers()
    if tiers is not None:
        row.device, row.host, row.disk = (tiers.get(tier, 0) for tier in TIERS)
        row.moved = record.handle.bytes_moved()


def _model_row(root: nn.Module, records: Sequence[Applied]) -> Row:
    """All bytes of the model: what techniques hold, and a walk over the storages that no technique answers for."""
    row = Row(technique=original_class(root).__name__, modules=sum(1 for _ in root.modules()))
    tiers = [found for record in records if (found := record.handle.tiers()) is not None]
    if tiers:
        row.device, row.host, row.disk = (sum(found.get(tier, 0) for found in tiers) for tier in TIERS)
        return row
    seen: dict[tuple[str, int], tuple[str, int]] = {}
    for tensor in map(_local, (*root.parameters(), *root.buffers())):
        if tensor.device.type != "meta" and not is_lazy(tensor):
            key, size = _memory(tensor)
            seen[key] = (tensor.device.type, size)
    computes_elsewhere = any(kind != "cpu" for kind, _ in seen.values())
    for kind, size in seen.values():
        if kind == "cpu" and computes_elsewhere:
            row.host += size
        else:
            row.device += size
    return row


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a distributed tensor."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _memory(tensor: torch.Tensor) -> tuple[tuple[str, int], int]:
    try:
        return storage_key(tensor), tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # a wrapper subclass has no storage of its own
        return ("object", id(tensor)), tensor_bytes(tensor)


def _flops(model: nn.Module, inputs: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if isinstance(inputs, dict):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    finally:
        model.train(training)
    return int(counter.get_total_flops())


def _foreign(root: nn.Module) -> list[str]:
    return [
        f"{seen.mechanism.name} at {seen.fqn or 'the model'} ({seen.count} places): {seen.mechanism.reason}"
        for seen in foreign_mechanisms(root)
    ]


_HEADER = ("technique", "modules", "slot", "device", "host", "disk", "moved/forward", "breaks")
_WIDTHS = (24, 8, 15, 11, 11, 11, 14, 0)


def _cells(row: Row) -> tuple[str, ...]:
    sizes = tuple(format_bytes(size) if size else "-" for size in (row.device, row.host, row.disk))
    moved = "-" if row.moved is None else format_bytes(row.moved)
    name = f"{row.technique} v{row.version}" if row.version else row.technique
    return (name, str(row.modules), row.slot or "-", *sizes, moved, str(row.graph_breaks))


def _places(row: Row) -> str:
    more = row.modules - len(row.first)
    return ", ".join(row.first) + (f" and {more} more" if more > 0 else "")


def _line(cells: Sequence[str]) -> str:
    parts = [cell[: width - 1].ljust(width) if width else cell for cell, width in zip(cells, _WIDTHS, strict=True)]
    return "".join(parts)[:WIDTH].rstrip()
