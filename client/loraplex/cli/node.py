"""`loraplex shard` for several ranks of one machine. They all stop when one ends: whoever runs this command, such as
the kubelet, starts it again, since the ranks of other machines have to start with them."""

import asyncio
import signal

from loraplex.cli.ranks import STOP_SECONDS, Ranks
from loraplex.cli.run_folder import run_folder
from loraplex_protos.errors import UnavailableError
from loraplex_shard.settings import NodeSettings


async def run(settings: NodeSettings) -> None:
    """Runs the ranks until SIGTERM or SIGINT, which lets them drain. Raises UnavailableError once one has ended."""
    told = asyncio.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    with run_folder() as folder:
        ranks = Ranks(settings.shards, folder)
        await ranks.start()
        ending, stopping = asyncio.create_task(ranks.end()), asyncio.create_task(told.wait())
        await asyncio.wait([ending, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if told.is_set():
            ending.cancel()
            await ranks.stop(settings.drain_seconds + STOP_SECONDS)
        else:
            await ranks.kill()
            raise UnavailableError(f"{ending.result()}; its group ends with it; see above")
