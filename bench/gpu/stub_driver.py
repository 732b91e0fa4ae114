"""A driver for Triton that takes kernels and launches nothing, so that what a launch costs the host can be measured
without a GPU. Kernels are compiled for a real one."""

import os

os.environ["TRITON_INTERPRET"] = "0"

from collections.abc import Callable
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class StubDriver:
    """What Triton asks its driver for. `launches` counts."""

    def __init__(self, capability: int) -> None:
        self.capability, self.launches = capability, 0
        self.utils = SimpleNamespace(load_binary=_load_binary, get_device_properties=_get_device_properties)

    def install(self) -> None:
        driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: object) -> None:
        self.launches += 1


def _load_binary(*arguments: object) -> tuple[int, int, int, int, int]:
    return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads


def _get_device_properties(device: int) -> dict[str, int]:
    return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}
