"""Chooses the implementation of the operations for this machine."""

import logging
from functools import partial
from pathlib import Path

import torch

from loraplex_shard.kernels.library import Kernels, KernelsError, build, instruction_sets
from loraplex_shard.ops.base import Operations
from loraplex_shard.ops.cpu.operations import CpuOperations
from loraplex_shard.ops.reference import ReferenceOperations

logger = logging.getLogger(__name__)


def check_kernels(device: torch.device) -> None:
    """Raises SettingsError if Triton cannot compile the kernels for a GPU, which otherwise shows in the first step. To
    be called on a thread that uses the device."""
    if device.type == "cuda":
        from loraplex_shard.ops.cuda.trial import try_kernel

        try_kernel(device)


def load_kernels(device: torch.device, directory: Path | None) -> Kernels | None:
    """The compiled kernels for a CPU; None for another device. They are built into `directory` (see library.build) if
    they are not there yet, for the best instruction set that the processor has and the compiler knows."""
    if device.type != "cpu":
        return None
    for name in instruction_sets():
        try:
            return Kernels(
                build(directory, name, partial(logger.info, "compiling the CPU kernels for %s (once)", name))
            )
        except KernelsError as error:
            logger.warning("no CPU kernels for %s: %s", name, error.message)
    logger.warning("operations run in plain torch, which takes several times as long")
    return None


def choose_operations(device: torch.device, dtype: torch.dtype, kernels: Kernels | None) -> Operations:
    """The operations for a device. A CPU gets the kernels, with the number of threads that torch has now, or plain
    torch if there are no kernels or the dtype is float16, which they do not have."""
    if device.type == "cuda":
        # Triton is installed only with torch for CUDA.
        from loraplex_shard.ops.cuda.graphs import GraphRecorder
        from loraplex_shard.ops.cuda.operations import CudaOperations

        return CudaOperations(device, GraphRecorder())
    return ReferenceOperations() if kernels is None or dtype == torch.float16 else CpuOperations(kernels)
