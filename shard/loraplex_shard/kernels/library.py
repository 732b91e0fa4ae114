"""Compiles the kernels in csrc/ for this processor, once, and loads them. It does not know what the kernels compute.

The library has a plain C interface, so it compiles in seconds, without torch's headers. It has threads of its own (see
team.h), as many as torch has. The two sets of threads work in turns, because a caller of either waits for the result.
"""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from loraplex_protos.errors import LoraplexError

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++20", "-pthread", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast")

# By instruction set, best first: the compiler's flags, and the capabilities that the processor needs, as torch names
# them.
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

# Constants of Linux on x86: the system call, the request ARCH_REQ_XCOMP_PERM, and the state that is requested.
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18

# The types of kernels' parameters and results, apart from pointers and void.
TYPES = {"int": ctypes.c_int, "long": ctypes.c_long, "float": ctypes.c_float}

# The kernels' numbers for the dtypes of tensors.
KINDS = {torch.float32: 0, torch.bfloat16: 1}


T = TypeVar("T")


class KernelsError(LoraplexError):
    """The kernels could not be compiled. The message says why."""


def instruction_sets() -> list[str]:
    """The instruction sets that this process can run, best first. If the processor has AMX, Linux is asked for
    permission to use its tile registers."""
    has = torch.cpu.get_capabilities()
    names = [name for name, (_, needed) in INSTRUCTION_SETS.items() if all(has.get(each) for each in needed)]
    if "amx" in names and not _tiles_granted():
        names.remove("amx")
    return names


def instruction_set() -> str:
    """The best instruction set that this process can run."""
    return instruction_sets()[0]


def compiles(name: str) -> bool:
    """Whether the compiler knows instruction set `name`; it may not know those of other processors. Raises KernelsError
    if there is no compiler."""
    flags = INSTRUCTION_SETS[name][0]
    return not flags or _run([_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]).returncode == 0


def build(directory: Path | None, name: str, notify: Callable[[], None] | None = None) -> Path:
    """Returns the library for instruction set `name`, compiled into `directory` unless it is there. The default
    directory is loraplex/kernels in the user's cache.

    The file's name depends on the sources, the flags and torch's version. Several processes that ask at the same time
    compile it once. `notify` is called before the compiler starts; it runs for ten seconds to half a minute.

    Raises KernelsError.
    """
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex" / "kernels"
    path = directory / f"{name}-{_digest(name)}.so"
    if path.exists():
        return _own(path)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(directory / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                if notify is not None:
                    notify()
                _compile(name, path)
    except OSError as error:
        raise KernelsError(f"kernels: cannot write to {directory}: {error.strerror}") from error
    return _own(path)


def _own(path: Path) -> Path:
    """Returns the path. Raises KernelsError if another user could have written the library."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        raise KernelsError(f"kernels: other users can write {path}: keep the kernels in a folder of your own")
    return path


class Kernels:
    """The compiled library. Kernels are called by name, with keyword arguments. kernels.h has the names.

    Arguments are numbers and addresses; None is a null pointer.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.kernels.restype = ctypes.c_char_p
        lines = self._library.kernels().decode().splitlines()
        kernels = [self._read(number, line) for number, line in enumerate(lines)]
        self._kernels = {kernel.name: kernel for kernel in kernels}
        self.most_parameters = max(len(kernel.parameters) for kernel in self._kernels.values())

    def call(self, name: str, /, **arguments: int | float | None) -> int:
        """Calls a kernel and returns its result, or 0 if it has none."""
        kernel = self._kernels[name]
        return kernel.function(*kernel.ordered(arguments)) or 0

    def row(self, name: str, arguments: Mapping[str, T]) -> tuple[int, tuple[T, ...]]:
        """Returns a call as the kernel `run` reads it: the kernel's number, and the arguments in order."""
        kernel = self._kernels[name]
        return kernel.number, kernel.ordered(arguments)

    def _read(self, number: int, line: str) -> "Kernel":
        """Reads a line of the library's table: `void linear(int threads, ..., void* out)`."""
        result, name, parameters = re.fullmatch(r"(\w+) (\w+)\((.*)\)", line).groups()  # type: ignore[union-attr]
        types, names = zip(*(parameter.rsplit(" ", 1) for parameter in parameters.split(", ")), strict=True)
        function = getattr(self._library, name)
        function.restype = TYPES.get(result)
        function.argtypes = [ctypes.c_void_p if "*" in type else TYPES[type] for type in types]
        return Kernel(number, name, names, function)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of the library."""

    number: int  # its index in the list of kernels.h
    name: str
    parameters: tuple[str, ...]
    function: Callable[..., int | None]

    def ordered(self, arguments: Mapping[str, T]) -> tuple[T, ...]:
        """Returns the arguments in the order of the parameters. Raises TypeError if one is missing or unknown."""
        if len(arguments) != len(self.parameters) or any(name not in arguments for name in self.parameters):
            raise TypeError(f"{self.name} takes {self.parameters}, not {tuple(arguments)}")
        return tuple([arguments[name] for name in self.parameters])


def _tiles_granted() -> bool:
    """Asks Linux to let this process use AMX, and returns whether it does. The answer holds for all threads and for
    child processes."""
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
