"""Compiles what would be launched, for a card that is not there, and reads the result."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchwrap.attention.triton.blocks import Card
from torchwrap.attention.triton.launches import Launch

# 3.9 warns where it is not said; launches ask for it themselves.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Shared memory that one program may have, in KiB (CUDA C++ programming guide, table of technical specifications).
SHARED_KIB = {60: 48, 61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX_INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16",
    torch.uint8: "*u8",
}  # fmt: skip


def card(capability: int) -> Card:
    return Card(capability=capability, shared_bytes=SHARED_KIB[capability] << 10, processors=64)


@dataclass(frozen=True)
class Compiled:
    name: str
    shared_bytes: int
    ptx: str
    cubin: bytes

    def count(self, instruction: str) -> int:
        return self.ptx.count(instruction)

    def usage(self, folder: Path) -> dict[str, int]:
        """Registers of a thread (REG) and bytes of its stack (STACK), which is where registers are spilled to."""
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        file = folder / "kernel.cubin"
        file.write_bytes(self.cubin)
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def compiled(launch: Launch, capability: int) -> Compiled:
    """The kernel of a launch as the runtime would specialise it: None and 1 are constants, what 16 divides is known to be so."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i64" if abs(value) > 2**31 else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(name=launch.kernel.__name__, shared_bytes=result.metadata.shared, ptx=result.asm["ptx"], cubin=result.asm["cubin"])
