"""Instructions in a cubin, counted without a disassembler, and NVIDIA's disassembler where one is at hand.

A cubin is an ELF file; since Volta an instruction is 16 bytes, its opcode the low 12 bits, the predicate the next four. The opcodes below
were read off nvdisasm 12.8 and are checked against it by a test that runs where it is found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

# SHFL: lane and mask in registers, one of them a constant, both constants.
OPCODES = dict.fromkeys((0x389, 0x589, 0x989, 0xF89), "SHFL")
OPCODES |= {0x236: "HMMA.884", 0x23C: "HMMA", 0x83B: "LDSM", 0x983: "LDL", 0x387: "STL"}
_NEVER = 0xF  # predicate !PT: never executed; the compiler places such instructions as fences on sm_70


def code(cubin: bytes) -> bytes:
    """All instructions, section after section."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    found = b""
    for name, _, _, _, offset, length in sections:
        if cubin[strings + name :].startswith(b".text."):
            found += cubin[offset : offset + length]
    return found


def counts(cubin: bytes) -> Counter[str]:
    """How often each instruction of `OPCODES` stands in the code; HMMA.884 with its step, as in "HMMA.884.STEP2"."""
    result: Counter[str] = Counter()
    for low, high in struct.iter_unpack("<QQ", code(cubin)):
        name = OPCODES.get(low & 0xFFF)
        if name is None or low >> 12 & 0xF == _NEVER:
            continue
        result[f"{name}.STEP{high >> 15 & 3}" if name == "HMMA.884" else name] += 1
    return result


def disassembler() -> str | None:
    """nvdisasm: `$TORCHWRAP_NVDISASM`, on the path, or in triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = [Path(place) / "backends/nvidia/bin/nvdisasm" for place in (triton.submodule_search_locations or ())] if triton else []
    bundled = next((str(place) for place in places if os.access(place, os.X_OK)), None)
    return os.environ.get("TORCHWRAP_NVDISASM") or shutil.which("nvdisasm") or bundled


def disassembled(cubin: bytes, folder: Path, program: str) -> Counter[str] | str:
    """The same counts by nvdisasm, or why it refused the file."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    done = subprocess.run([program, "-c", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip()
    result: Counter[str] = Counter()
    for predicate, name in re.findall(r"/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", done.stdout):
        step = re.match(r"HMMA\.884\..*(STEP\d)", name)
        if predicate.strip() == "@!PT":
            continue
        if step:
            result[f"HMMA.884.{step[1]}"] += 1
        elif name.split(".")[0] in OPCODES.values():
            result[name.split(".")[0]] += 1
    return result
