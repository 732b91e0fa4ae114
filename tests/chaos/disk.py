"""A small disk that can be full: a file system in memory, which only root can mount."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

SIZE = 256 << 20


class Disk:
    """The folder is on a disk of its own during the `with` block, if this user may mount one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"
        self.mounted = False

    def __enter__(self) -> Self:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "loraplex-chaos", str(self._folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self._folder)], check=True)

    def fill(self) -> None:
        with self._ballast.open("wb") as file:
            while (status := os.statvfs(file.fileno())).f_bavail:
                with suppress(OSError):  # others have written meanwhile
                    size = os.fstat(file.fileno()).st_size + status.f_bavail * status.f_bsize
                    os.posix_fallocate(file.fileno(), 0, size)

    def free(self) -> None:
        self._ballast.unlink()
