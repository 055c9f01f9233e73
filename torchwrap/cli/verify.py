"""Is a checkpoint folder whole? Headers, index, plan, missing and extra tensors, and with --checksums every byte.

Headers, index and plan are checked from the files alone. Missing and extra tensors are found by building the model without weights, if an
integration knows the folder. --checksums reads everything: it prints the SHA-256 of each file, compares it with a `SHA256SUMS` file if the
folder has one, and reports tensors that are all zero or hold NaN. Exit status 1 when something is wrong.

example: torchwrap verify ./my-model --checksums
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torchwrap.cli.output import Outcome, existing_folder

if TYPE_CHECKING:
    from torchwrap.cli.checkpoint import Checkpoint

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "is a checkpoint folder whole: headers, index, plan, missing and extra tensors, checksums"

_SUMS = "SHA256SUMS"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", type=existing_folder, help="folder with safetensors files")
    parser.add_argument("--checksums", action="store_true", help="read every byte; compare with SHA256SUMS if the folder has one")


def run(arguments: argparse.Namespace) -> Outcome:
    """Collect findings; a finding is something wrong, a note is something that could not be checked."""
    from torchwrap.cli.checkpoint import read_checkpoint

    found = read_checkpoint(arguments.checkpoint)
    findings, sums = [*found.findings, *_plan(found)], dict[str, str]()
    notes: list[str] = []
    if not findings:
        _names(found, findings, notes)
    if arguments.checksums:
        sums = _checksums(found, findings, notes)
    else:
        notes.append("contents were not read; --checksums reads every byte")
    data: dict[str, object] = {
        "checkpoint": str(found.folder),
        "files": found.files,
        "tensors": len(found.tensors),
        "bytes": found.nbytes,
        "plan": found.plan is not None,
        "sha256": sums,
        "findings": findings,
        "notes": notes,
    }
    lines = [f"{found.folder}: {len(found.tensors)} tensors in {len(found.files)} files, {'whole' if not findings else 'NOT whole'}"]
    lines += [f"{digest}  {name}" for name, digest in sums.items()]
    lines += [f"problem: {text}" for text in findings] + [f"note: {text}" for text in notes]
    return Outcome(data=data, text="\n".join(lines), ok=not findings)


def _plan(found: Checkpoint) -> list[str]:
    if found.plan is None:
        return []
    from torchwrap.core.errors import TorchwrapError
    from torchwrap.core.plan import Plan

    try:
        Plan.load(found.folder)
    except TorchwrapError as error:
        return [f"torchwrap.json: {error}"]
    return []


def _names(found: Checkpoint, findings: list[str], notes: list[str]) -> None:
    """Compare the stored names with those of the model that the folder's config describes."""
    from torchwrap.core.errors import TorchwrapError, UnsupportedModelError
    from torchwrap.core.integration import integration_for_folder

    try:
        integration = integration_for_folder(found.folder)
    except UnsupportedModelError as error:
        notes.append(f"missing and extra tensors were not looked for: {error}")
        return
    with tempfile.TemporaryDirectory(prefix="torchwrap-verify-") as work:
        try:
            skeleton = integration.skeleton(found.folder, Path(work))
        except (TorchwrapError, OSError) as error:
            findings.append(str(error))
            return
    used = {key for path, key in skeleton.weights.values() if path.parent == found.folder}
    objects = {id(parameter) for name, parameter in skeleton.model.named_parameters(remove_duplicate=False) if name in skeleton.weights}
    missing = [name for name, parameter in skeleton.model.named_parameters() if id(parameter) not in objects]
    findings += [f"tensor {name} of {type(skeleton.model).__name__} is in no file" for name in missing]
    if used:
        extra = sorted(set(found.tensors) - used)
        notes += [f"tensor {name} is in {found.tensors[name].file} but the model has no place for it" for name in extra]


def _checksums(found: Checkpoint, findings: list[str], notes: list[str]) -> dict[str, str]:
    sums: dict[str, str] = {}
    expected = _expected(found.folder)
    for name in found.files:
        digest = hashlib.sha256()
        with (found.folder / name).open("rb") as stream:
            while chunk := stream.read(8 << 20):
                digest.update(chunk)
        sums[name] = digest.hexdigest()
        if name in expected and expected[name] != sums[name]:
            findings.append(f"{name} has SHA-256 {sums[name]}, {_SUMS} says {expected[name]}: the file was changed or damaged")
        _contents(found, name, findings, notes)
    if not expected:
        notes.append(f"no {_SUMS} in the folder to compare with")
    return sums


def _expected(folder: Path) -> dict[str, str]:
    """`sha256sum` format: digest, two characters, file name."""
    try:
        lines = (folder / _SUMS).read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return {pair[1].lstrip("*"): pair[0].lower() for pair in pairs if len(pair) == 2}


def _contents(found: Checkpoint, file: str, findings: list[str], notes: list[str]) -> None:
    """NaN is never meant to be in a weight; all zeros may be (a fresh bias), so it is only noted for matrices."""
    import torch

    from torchwrap.storage.safefile import TensorFile

    opened = TensorFile.open(found.folder / file)
    try:
        for name, segment in opened.segments.items():
            if segment.nbytes == 0 or not segment.dtype.is_floating_point:
                continue
            values = opened.view(name)
            if segment.dtype.itemsize == 1:  # 8-bit floats have no reductions
                values = values.float()
            if bool(torch.isnan(values).any()):
                findings.append(f"tensor {name} in {file} holds NaN")
            elif len(segment.shape) > 1 and not bool(values.any()):
                notes.append(f"tensor {name} in {file} is all zero")
    finally:
        opened.close()
