"""Compiled kernels on a card: loading and launching through the driver's interface, on torch's current stream.

Source: NVIDIA, CUDA driver API, modules and execution control.
"""

from __future__ import annotations

import ctypes
import threading

import torch

from torchwrap.attention.cuda import nvrtc
from torchwrap.attention.cuda.params import Params
from torchwrap.attention.cuda.variants import Variant
from torchwrap.core.errors import KernelError

__all__ = ["Card"]

_LIBRARY = "libcuda.so.1"


class Card:
    """One CUDA device of this process, and the kernels loaded on it.

    Args:
        device: a CUDA device with an index.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device: torch.device = device
        self.arch: int = 10 * properties.major + properties.minor
        self.multiprocessors: int = properties.multi_processor_count
        # Without asking for more; every kernel here stays within it.
        self.shared_bytes: int = getattr(properties, "shared_memory_per_block", 48 << 10)
        self._driver = ctypes.CDLL(_LIBRARY)
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self._driver.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        self._loaded: dict[Variant, ctypes.c_void_p] = {}
        self._context = ctypes.c_void_p()
        self._lock = threading.Lock()

    def launch(self, variant: Variant, grid: tuple[int, int, int], params: Params) -> None:
        """Queue a kernel on the current stream of this device.

        Raises:
            KernelError: the kernel cannot be compiled for this device, or the driver refused it; the message names its error.
        """
        if variant.shared_bytes > self.shared_bytes:
            raise KernelError(
                f"{variant.entry} needs {variant.shared_bytes} bytes of shared memory, a block has {self.shared_bytes}",
                where=str(self.device), fix="Use another back end on this card.",
            )  # fmt: skip
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            with self._lock:
                self._enter()
                function = self._loaded.get(variant) or self._load(variant)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))  # the driver copies what they point to
            queued = self._driver.cuLaunchKernel(function, *grid, variant.threads, 1, 1, 0, stream.cuda_stream, arguments, None)
            self._check(queued, f"launching {variant.entry}")

    def _load(self, variant: Variant) -> ctypes.c_void_p:
        cubin = nvrtc.binary(variant, self.arch).cubin
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin), f"loading {variant.entry} for sm_{self.arch}")
        found = self._driver.cuModuleGetFunction(ctypes.byref(function), module, variant.entry.encode())
        self._check(found, f"finding {variant.entry}")
        self._loaded[variant] = function
        return function

    def _enter(self) -> None:
        """Make the context that torch uses current in this thread: a thread has none until it calls the runtime interface."""
        if not self._context.value:
            handle = ctypes.c_int()
            self._check(self._driver.cuDeviceGet(ctypes.byref(handle), self.device.index), "finding the device")
            self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle), "taking the context")
        current = ctypes.c_void_p()
        self._check(self._driver.cuCtxGetCurrent(ctypes.byref(current)), "asking for the context")
        if current.value != self._context.value:
            self._check(self._driver.cuCtxSetCurrent(self._context), "entering the context")

    def _check(self, code: int, doing: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            message = text.value.decode() if text.value else "unknown error"
            raise KernelError(f"{doing} failed with error {code}: {message}", where=str(self.device))
