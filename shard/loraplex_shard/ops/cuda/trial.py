"""Tries a tiny kernel: whether Triton can compile one and the GPU runs it shows at once, before a model is read."""

import torch
import triton
import triton.language as tl

from loraplex_shard.settings import SettingsError


def try_kernel(device: torch.device) -> None:
    """Raises SettingsError if a kernel cannot be compiled and run. To be called on a thread that uses the device."""
    try:
        out = torch.zeros(1, dtype=torch.int32, device=device)
        _write_one[(1,)](out)
        assert int(out) == 1
    except Exception as error:  # of the compiler, of the driver, of the folder for what is compiled
        raise SettingsError(
            f"device: cannot compile and run a kernel ({type(error).__name__}: {error}). Triton needs a C compiler "
            "(gcc, or CC), the header files of Python (python3-dev), a folder to write to (TRITON_CACHE_DIR), and a "
            f"driver as new as torch's CUDA {torch.version.cuda}; or set device to cpu"
        ) from error


@triton.jit
def _write_one(out):
    tl.store(out, 1)
