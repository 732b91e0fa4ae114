"""The processes of one replica's ranks on this machine. Ranks can only start together, so they also end together: if
one dies, or the router reports that the replica is silent, all are killed, and restarted by whoever runs them."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from loraplex.cli.restarts import Restarts
from loraplex.cli.variables import is_setting
from loraplex_protos.errors import UnavailableError
from loraplex_shard.settings import ShardSettings

STOP_SECONDS = 10  # how long a shard has to stop when it is told to
# Tells a rank that has a supervisor to stop. SIGTERM may come to all processes at once, from systemd for example, and
# only the supervisor knows when the ranks are needed no more.
STOP = signal.SIGUSR1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened before any fork: a child may inherit held locks
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

logger = logging.getLogger(__name__)


class Ranks:
    """Starts and restarts the ranks. This is the router's `Supervisor`: the router tells it how the replica is
    doing."""

    def __init__(self, shards: Callable[[str], Sequence[ShardSettings]], folder: str) -> None:
        """`shards` gives the ranks' settings for the URL at which they meet, which is a file in `folder`, another one
        for each start."""
        self._shards = shards
        self._folder = folder
        self._processes: dict[int, asyncio.subprocess.Process] = {}  # by rank
        self._restarts = Restarts()
        self._ready_since: float | None = None
        self._silence = asyncio.Event()
        self._starts = 0

    def ready(self) -> None:
        """The router has connected to the replica, which is ready."""
        self._ready_since = time.monotonic()

    def silent(self) -> None:
        """The router has given up on the replica, which has stopped answering."""
        self._silence.set()

    async def start(self) -> None:
        """Starts all ranks."""
        self._processes.clear()
        self._silence.clear()
        self._ready_since = None
        self._starts += 1
        for settings in self._shards(f"file://{self._folder}/{self._starts}"):
            self._processes[settings.rank] = await _start_shard(shard_flags(settings))

    async def keep(self) -> NoReturn:
        """Restarts the ranks whenever they end. Raises UnavailableError when they should not be restarted."""
        while True:
            end = await self.end()
            served = None if self._ready_since is None else time.monotonic() - self._ready_since
            await self.kill()
            delay = self._restarts.delay(served)
            if delay is None:
                raise UnavailableError(f"{end} {self._restarts.reason}; see above")
            logger.warning("%s; restarting the ranks%s", end, f" in {delay:g} s" if delay else "")
            await asyncio.sleep(delay)
            await self.start()

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Asks the ranks to stop, and kills any that do not within that time."""
        await asyncio.gather(*(_stop_shard(process, seconds) for process in self._processes.values()))

    async def end(self) -> str:
        """Waits for the replica to end, and says how it ended."""
        ends = {rank: asyncio.create_task(process.wait()) for rank, process in self._processes.items()}
        silence = asyncio.create_task(self._silence.wait())
        try:
            await asyncio.wait([*ends.values(), silence], return_when=asyncio.FIRST_COMPLETED)
            for rank, end in ends.items():
                if end.done():
                    return f"rank {rank} {describe_end(end.result())}"
            return "the ranks stopped answering"
        finally:
            for task in (*ends.values(), silence):
                task.cancel()

    async def kill(self) -> None:
        """Returns once all processes have ended, so that their memory and ports are free for the next start."""
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in self._processes.values()))


def describe_end(status: int) -> str:
    """How a process ended, from its return code."""
    if status >= 0:
        return f"ended with status {status}"
    hint = " (out of memory?)" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def shard_flags(settings: ShardSettings) -> list[str]:
    """The arguments of `loraplex shard` for one rank."""
    flags = settings.model_dump(mode="json", exclude_none=True)
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


async def _start_shard(flags: list[str]) -> asyncio.subprocess.Process:
    # -P: a file of the current directory must not take the place of the module that has its name.
    command = [sys.executable, "-P", "-m", "loraplex.cli.main", "shard", "--supervised", *flags]
    # The flags are complete; the variables are the settings of this process.
    environment = {name: value for name, value in os.environ.items() if not is_setting(name)}
    # In a session of its own, so that Ctrl-C only reaches the router, which drains before it stops the shards.
    return await asyncio.create_subprocess_exec(
        *command, env=environment, start_new_session=True, preexec_fn=partial(_end_with_parent, os.getpid())
    )


def _end_with_parent(parent: int) -> None:
    """Lets the kernel stop a shard whose supervisor was killed (Linux only)."""
    if LIBC is not None:
        LIBC.prctl(SET_DEATH_SIGNAL, STOP)
        if os.getppid() != parent:  # the supervisor was killed before prctl
            os._exit(0)


async def _stop_shard(shard: asyncio.subprocess.Process, seconds: float) -> None:
    if shard.returncode is None:
        shard.send_signal(STOP)
        try:
            await asyncio.wait_for(shard.wait(), seconds)
        except TimeoutError:
            shard.kill()
