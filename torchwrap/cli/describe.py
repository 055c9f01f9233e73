"""What a checkpoint folder holds: the model, the plan saved with it, and its tensors by module, from the headers alone.

example: torchwrap describe ./my-model
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict

from torchwrap.cli.output import Outcome, existing_folder, table

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "the model, the saved plan and the tensors of a checkpoint folder"

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", type=existing_folder, help="folder with safetensors files")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not only the sums by module")


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the headers and add up."""
    from torchwrap.cli.checkpoint import read_checkpoint

    found = read_checkpoint(arguments.checkpoint)
    groups: dict[str, list[int]] = defaultdict(list)
    for tensor in found.tensors.values():
        groups[_group(tensor.name)].append(tensor.segment.nbytes)
    dtypes = Counter[str]()
    for tensor in found.tensors.values():
        dtypes[str(tensor.segment.dtype).removeprefix("torch.")] += tensor.segment.nbytes
    data: dict[str, object] = {
        "checkpoint": str(found.folder),
        "architectures": found.config.get("architectures", []),
        "model_type": found.config.get("model_type"),
        "files": found.files,
        "tensors": len(found.tensors),
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "bytes_by_dtype": dict(dtypes),
        "modules": [{"name": name, "tensors": len(sizes), "bytes": sum(sizes)} for name, sizes in groups.items()],
        "plan": found.plan,
        "findings": found.findings,
    }
    if arguments.tensors:
        data["tensor_list"] = [
            {
                "name": one.name,
                "dtype": str(one.segment.dtype),
                "shape": list(one.segment.shape),
                "bytes": one.segment.nbytes,
                "file": one.file,
            }
            for one in found.tensors.values()
        ]
    return Outcome(data=data, text=_text(data), ok=not found.findings)


def _group(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*`: members of one list count together."""
    owner = name.rpartition(".")[0] or name
    first = _NUMBER.search(owner)
    return owner[: first.start()] + ".*" if first else owner


def _text(data: dict[str, object]) -> str:
    from torchwrap.core.config import format_bytes

    modules, files, plan, findings = data["modules"], data["files"], data["plan"], data["findings"]
    assert isinstance(modules, list) and isinstance(files, dict) and isinstance(findings, list)
    by_dtype, architectures = data["bytes_by_dtype"], data["architectures"]
    assert isinstance(by_dtype, dict) and isinstance(architectures, list)
    dtypes = ", ".join(f"{dtype} {format_bytes(nbytes)}" for dtype, nbytes in by_dtype.items())
    lines = [
        f"{data['checkpoint']}: {', '.join(map(str, architectures)) or data['model_type'] or 'unknown model'}, "
        f"{data['parameters']:,} parameters, {data['tensors']} tensors in {len(files)} files ({dtypes})",
        "",
        table([(row["name"], row["tensors"], format_bytes(row["bytes"])) for row in modules], ("module", "tensors", "bytes")),
    ]
    if "tensor_list" in data:
        rows = [
            (row["name"], row["dtype"], "x".join(map(str, row["shape"])) or "scalar", row["file"]) for row in _rows(data["tensor_list"])
        ]
        lines += ["", table(rows, ("tensor", "dtype", "shape", "file"))]
    lines += ["", _plan_text(plan)]
    lines += [f"problem: {finding}" for finding in findings]
    return "\n".join(lines)


def _rows(value: object) -> list[dict[str, list[int]]]:
    assert isinstance(value, list)
    return value


def _plan_text(plan: object) -> str:
    if not isinstance(plan, dict):
        return "plan: none saved (no torchwrap.json)"
    techniques = plan.get("techniques")
    named = [row for row in techniques if isinstance(row, dict)] if isinstance(techniques, list) else []
    rows = [
        (row.get("name"), row.get("version"), ", ".join(f"{key}={value!r}" for key, value in dict(row.get("config") or {}).items()))
        for row in named
    ]
    return f"plan of torchwrap {plan.get('torchwrap', 'unknown')}:\n" + table(rows, ("technique", "version", "fields"))
