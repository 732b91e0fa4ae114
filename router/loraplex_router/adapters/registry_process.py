"""Reads a long registry file in a process of its own: thousands of names take seconds, in which the router's event loop
would get the interpreter rarely."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import orjson

from loraplex_router.adapters.registry import Registered
from loraplex_router.adapters.registry_content import RegistryFileError, read_registry
from loraplex_router.vocabulary.references import AdapterReference, Version

SHORT = 1 << 16  # bytes; to read less takes less than to start a process
NICENESS = 10
REFUSED = 3  # the exit status if the file is wrong; why is on stderr

logger = logging.getLogger(__name__)


def read_beside(path: Path) -> Registered:
    """As read_registry. Blocks, but hardly holds the interpreter's lock."""
    try:
        short = path.stat().st_size <= SHORT
    except OSError:
        short = True
    if short:
        return read_registry(path)
    command = sys.executable, "-P", "-m", __name__, str(path)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True, check=False
        )
    except OSError as error:  # a limit on processes or on memory is reached
        logger.warning("the adapter registry is read in the router's own process: %s", error.strerror)
        return read_registry(path)
    if done.returncode == REFUSED:
        raise RegistryFileError(done.stderr.decode())
    if done.returncode:
        why = f"the process that reads it ended with status {done.returncode}"
        raise RegistryFileError(f"--adapter-registry: {path}: {why}: {done.stderr.decode(errors='replace')[-500:]}")
    return _decode(done.stdout)


def _encode(content: Registered) -> bytes:
    names = {
        name: [
            (each.number, each.origin.id, each.origin.source, each.origin.revision, each.digest, each.fault)
            for each in versions.values()
        ]
        for name, versions in content.names.items()
    }
    return orjson.dumps((names, content.aliases))


def _decode(data: bytes) -> Registered:
    names, aliases = orjson.loads(data)
    return Registered(
        {
            name: {
                number: Version(name, number, AdapterReference(id, source, revision), digest, fault)
                for number, id, source, revision, digest, fault in versions
            }
            for name, versions in names.items()
        },
        aliases,
    )


def main() -> None:
    os.nice(NICENESS)
    try:
        content = read_registry(Path(sys.argv[1]))
    except RegistryFileError as error:
        sys.stderr.write(error.message)
        sys.exit(REFUSED)
    sys.stdout.buffer.write(_encode(content))


if __name__ == "__main__":
    main()
