"""Which implementation of the operations this machine gets."""

import logging
from pathlib import Path

import torch

from loraplex_shard.ops.base import Operations
from loraplex_shard.ops.cpu.library import KernelsError, build, instruction_set, load
from loraplex_shard.ops.cpu.operations import CpuOperations
from loraplex_shard.ops.reference import ReferenceOperations

logger = logging.getLogger(__name__)


def choose_operations(device: torch.device, dtype: torch.dtype, directory: Path | None) -> Operations:
    """On a CPU the compiled kernels, else plain torch.

    They are built into `directory` (see library.build) if they are not there yet, and run on as many threads as torch
    has now. There are none for float16 on a CPU.
    """
    if device.type != "cpu" or dtype == torch.float16:
        return ReferenceOperations()
    name = instruction_set()
    try:
        path = build(directory, name, lambda: logger.info("compiling the CPU kernels for %s (once)", name))
    except KernelsError as error:
        logger.warning("%s. Operations run in plain torch, which takes several times as long", error.message)
        return ReferenceOperations()
    return CpuOperations(load(path))
