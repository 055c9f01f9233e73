"""Builds torchwrap/native, the only compiled part; everything else is declared in pyproject.toml.

It is optional: without a compiler the installation succeeds, and torchwrap.native.reason() says why it is missing. The library has a plain
C interface and is loaded through ctypes, so it belongs to no Python version: the wheel is tagged for the platform alone, or for none when
nothing was compiled. Instruction sets beyond the processor's baseline get files of their own, compiled one beside the other; one
that the compiler does not know is left out. TORCHWRAP_CXXFLAGS holds more flags for the compiler, as "-O0" for a quick build of slow
kernels; with TORCHWRAP_NATIVE=0 nothing is compiled, and kernels that an earlier `setup.py build_ext --inplace` left in the tree stay.
"""

from __future__ import annotations

import os
import platform
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = Path("torchwrap/native/src")
# A name with two dots is no name of a Python module: nothing that walks through the package tries to import it.
FILE = "kernels.native.so"
# gcc 12 takes the undefined vectors of its own headers for mistakes of ours, a thousand lines of it.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
BEYOND_BASELINE = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
X86 = platform.machine().lower() in {"x86_64", "amd64"}


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set, then the rest, and links a shared library with a plain name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], FILE)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("TORCHWRAP_NATIVE") == "0":
            raise CompileError("TORCHWRAP_NATIVE=0")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            wanted = {"baseline": [], **(BEYOND_BASELINE if X86 else {})}
            compiled = {name: pool.submit(self.kernels, name, flags) for name, flags in wanted.items()}
        objects = compiled.pop("baseline").result()
        known = []
        for name, job in compiled.items():
            try:
                objects += job.result()
                known.append((f"WITH_{name.upper()}", None))
            except CompileError:
                self.warn(f"torchwrap: this compiler does not know {name}; its kernels are left out")
        objects += self.compiled(["blocks.cpp", "choices.cpp", "decode.cpp", "parallel.cpp", "prefill.cpp"], "rest", known, [])
        target = self.get_ext_fullpath(ext.name)
        libraries = ["dl", "pthread"]
        self.compiler.link_shared_object(objects, target, libraries=libraries, target_lang="c++", build_temp=self.build_temp)

    def kernels(self, name: str, flags: list[str]) -> list[str]:
        files = ["few_kernels.cpp", "gradient_kernels.cpp", "kernels.cpp", "prefill_kernels.cpp"]
        return self.compiled(files, name, [("INSTRUCTION_SET", name)], flags)

    def compiled(self, files: list[str], folder: str, macros: list[tuple[str, str | None]], flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(SOURCE / file) for file in files],
            output_dir=os.path.join(self.build_temp, folder),
            macros=macros,
            extra_postargs=[*FLAGS, *flags, *shlex.split(os.environ.get("TORCHWRAP_CXXFLAGS", ""))],
        )


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, system = super().get_tag()
        built = Path(self.bdist_dir, "torchwrap", "native", FILE).exists()
        return ("py3", "none", system if built else "any")


setup(
    ext_modules=[
        Extension(
            "torchwrap.native.kernels",
            sources=sorted(map(str, SOURCE.glob("*.cpp"))),
            depends=sorted(map(str, SOURCE.glob("*.h"))),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
