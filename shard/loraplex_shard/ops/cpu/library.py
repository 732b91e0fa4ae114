"""Compiles the kernels in csrc/ for this processor, once, and loads them. Knows the compiler, not what kernels compute.

The library has a plain C interface, so that it is compiled in seconds, without torch's headers. Its threads are its own
(see team.h) and as many as torch's; the two work in turns, since whoever calls one of them waits for it.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from loraplex_protos.errors import LoraplexError

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++20", "-pthread", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast")

# By instruction set, best first: what the compiler is told, and the processor's capabilities, as torch names them.
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c")
AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "amx": (
        (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    ),
    "avx512_bf16": ((*AVX512_FLAGS, "-mavx512bf16"), (*AVX512, "avx512_bf16")),
    "avx512": (AVX512_FLAGS, AVX512),
    "avx2": (("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma3", "f16c")),
    "portable": ((), ()),
}

# Numbers of Linux on x86: the system call, its request (ARCH_REQ_XCOMP_PERM) and the state it is about.
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18

# The functions that return a number; the others return nothing.
WITH_RESULTS = ("quantized_bytes", "run", "all_reduce", "broadcast", "gather")

# The numbers that kernels have for the types of tensors.
KINDS = {torch.float32: 0, torch.bfloat16: 1}


class KernelsError(LoraplexError):
    """The kernels could not be compiled. The message says why."""


def instruction_sets() -> list[str]:
    """Those that this process can run, best first. Asks the kernel for the tile registers of AMX, if there are any."""
    has = torch.cpu.get_capabilities()
    names = [name for name, (_, needed) in INSTRUCTION_SETS.items() if all(has.get(each) for each in needed)]
    if "amx" in names and not _tiles_granted():
        names.remove("amx")
    return names


def instruction_set() -> str:
    """The best one that this process can run."""
    return instruction_sets()[0]


def compiles(name: str) -> bool:
    """Whether the compiler knows instruction set `name`: those of other kinds of processors it does not. Raises
    KernelsError if there is none."""
    flags = INSTRUCTION_SETS[name][0]
    return not flags or _run([_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]).returncode == 0


def build(directory: Path | None, name: str, notify: Callable[[], None] | None = None) -> Path:
    """The library for instruction set `name`, compiled into `directory` unless it is there. Raises KernelsError.

    No directory: loraplex/kernels in the user's cache.
    Its file is named after the sources, the flags and torch's version. Processes that ask at the same time compile it
    once. `notify` is called before the compiler starts, which takes ten seconds to half a minute.
    """
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex" / "kernels"
    path = directory / f"{name}-{_digest(name)}.so"
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                if notify is not None:
                    notify()
                _compile(name, path)
    except OSError as error:
        raise KernelsError(f"kernels: cannot write to {directory}: {error.strerror}") from error
    return path


def load(path: Path) -> ctypes.CDLL:
    """The compiled library, with the types of its functions declared."""
    library = ctypes.CDLL(str(path))
    i, n, f, p = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p
    for name, arguments in {
        "linear": (i, i, n, n, n, p, p, p, p),
        "pack_weight": (i, n, n, p, p),
        "weight_rows": (i, i, n, p, n, p, p),
        "quantized_linear": (i, i, n, n, n, p, i, i, p, p, p),
        "quantized_bytes": (n, n, i, i),
        "pack_quantized": (n, n, i, i, p, p, p, p),
        "quantized_rows": (i, i, n, p, n, i, i, p, p),
        "add_lora_delta": (i, i, i, n, p, p, p, n, p, n, p, n),
        "add_rms_norm": (i, i, n, n, p, p, p, f, p),
        "silu_mul": (i, i, n, n, p, p),
        "widen": (i, i, n, n, p, p, p),
        "rotate_and_write": (i, i, n, p, n, n, n, n, p, f, p, p, p, p, p, p, p, p),
        "paged_attention": (i, i, p, n, n, n, n, f, f, n, p, p, p, p, n, p, p, p, n, p),
        "run": (p, n, n),
        "all_reduce": (p, i, n, p),
        "broadcast": (p, n, p),
        "gather": (p, n, p, p, p),
        "leave_group": (p,),
    }.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = n if name in WITH_RESULTS else None
    return library


def _tiles_granted() -> bool:
    """Whether Linux lets this process, all its threads and what they start use AMX, which it has to be asked once."""
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


def _digest(name: str) -> str:
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS[name], torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(name: str, path: Path) -> None:
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        target = Path(directory, path.name)
        command = [_compiler(), *FLAGS, *INSTRUCTION_SETS[name][0], *sources, "-o", str(target)]
        done = _run(command)
        if done.returncode:
            raise KernelsError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
        target.rename(path)


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsError("no C++ compiler: install g++, or set CXX")
    return compiler


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise KernelsError(f"{command[0]}: {error.strerror}") from error
