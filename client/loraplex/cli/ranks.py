"""The processes of one replica's ranks on this machine. They can only begin together, so they end together, too: if one
dies, or the router says that the replica is silent, all of them are killed and started again."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from functools import partial

from loraplex.cli.restarts import Restarts
from loraplex_protos.errors import UnavailableError
from loraplex_shard.settings import ModelSettings

STOP_SECONDS = 10  # for a shard after SIGTERM
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened before any fork, where threads may hold locks
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

logger = logging.getLogger(__name__)


class Ranks:
    """Is told by the router what it sees of the replica: it is the router's `Supervisor`."""

    def __init__(self, settings: ModelSettings, metrics_port: int, folder: str) -> None:
        """`metrics_port`: rank 0's, those of the others follow; 0: none. `folder` is theirs alone."""
        self._settings = settings
        self._metrics_port = metrics_port
        self._folder = folder
        self._processes: list[asyncio.subprocess.Process] = []
        self._restarts = Restarts()
        self._ready_since: float | None = None
        self._silence = asyncio.Event()
        self.addresses = [f"unix:{folder}/rank{rank}.sock" for rank in range(settings.tp)]
        self._starts = 0

    def ready(self) -> None:
        """The router has taken the replica up."""
        self._ready_since = time.monotonic()

    def silent(self) -> None:
        """The router has given the replica up, since it does not answer any more."""
        self._silence.set()

    async def start(self) -> None:
        """Starts all ranks. Their rendezvous is a file of its own at each start, which nobody has been at."""
        self._processes.clear()
        self._silence.clear()
        self._ready_since = None
        self._starts += 1
        for rank, address in enumerate(self.addresses):
            flags = shard_flags(self._settings, self._metrics_port, rank, address, f"{self._folder}/{self._starts}")
            self._processes.append(await _start_shard(flags))

    async def keep(self) -> None:
        """Starts them again whenever they end. Raises UnavailableError when they are not to be."""
        while True:
            end = await self._end()
            served = None if self._ready_since is None else time.monotonic() - self._ready_since
            await self._kill()
            delay = self._restarts.delay(served)
            if delay is None:
                raise UnavailableError(f"{end} {self._restarts.reason}; see above")
            logger.warning("%s; the ranks are started again%s", end, f" in {delay:g} s" if delay else "")
            await asyncio.sleep(delay)
            await self.start()

    async def stop(self) -> None:
        """Lets them stop in good order, and kills what does not."""
        await asyncio.gather(*map(_stop_shard, self._processes))

    async def _end(self) -> str:
        """How the replica ended."""
        ends = [asyncio.create_task(process.wait()) for process in self._processes]
        silence = asyncio.create_task(self._silence.wait())
        try:
            await asyncio.wait([*ends, silence], return_when=asyncio.FIRST_COMPLETED)
            for rank, end in enumerate(ends):
                if end.done():
                    return f"rank {rank} {describe_end(end.result())}"
            return "the ranks did not answer any more"
        finally:
            for task in (*ends, silence):
                task.cancel()

    async def _kill(self) -> None:
        """What one of them holds is free for the next start once it is gone."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in self._processes))


def describe_end(status: int) -> str:
    """Of a process, from what it returned."""
    if status >= 0:
        return f"ended with status {status}"
    hint = " (out of memory?)" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def shard_flags(settings: ModelSettings, metrics_port: int, rank: int, address: str, rendezvous: str) -> list[str]:
    """What `loraplex shard` is told as one of the ranks, which listens at `address`; all of them meet at a file."""
    flags = settings.model_dump(mode="json", include=set(ModelSettings.model_fields), exclude_none=True)
    flags |= {"rank": rank, "listen": address, "rendezvous": f"file://{rendezvous}"}
    if metrics_port:
        flags["metrics_port"] = metrics_port + rank
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


async def _start_shard(flags: list[str]) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "loraplex.cli.main", "shard", *flags]
    # The flags say all: variables are this process's settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    # A session of its own: Ctrl-C reaches the router alone, which drains before it stops the shards.
    return await asyncio.create_subprocess_exec(
        *command, env=environment, start_new_session=True, preexec_fn=partial(_end_with_parent, os.getpid())
    )


def _end_with_parent(parent: int) -> None:
    """Lets the kernel stop a shard whose supervisor was killed (Linux only)."""
    if LIBC is not None:
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before this
            os._exit(0)


async def _stop_shard(shard: asyncio.subprocess.Process) -> None:
    if shard.returncode is None:
        shard.terminate()
        try:
            await asyncio.wait_for(shard.wait(), STOP_SECONDS)
        except TimeoutError:
            shard.kill()
