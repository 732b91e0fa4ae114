"""`loraplex top`: what a server is doing right now, from its metrics. It knows the metrics' names and nothing else
about the server."""

import http.client
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from loraplex.cli.connection import ApiKey
from loraplex.cli.http import open_url
from loraplex.cli.output import listing, pairs_in_lines, width
from loraplex.cli.samples import Change, Samples

BAR = 24  # characters
BLOCKS, BLOCKS_ASCII = "█▒░", "#=."  # in use, kept, free
MAX_ADAPTERS = 20  # rows

Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar="LORAPLEX_URL",
        help="A router's HTTP address; repeat it to show the sum of several.",
    ),
]
Interval = Annotated[
    float, typer.Option(min=0.1, max=86400, help="Seconds between two samples, over which rates are computed.")
]
Once = Annotated[bool, typer.Option("--once", help="Print one frame and exit.")]


def top(url: Urls = None, interval: Interval = 2.0, once: Once = False, api_key: ApiKey = None) -> None:
    """Watch a server: queues, adapters, batches and tokens per second."""
    urls = url or ["http://localhost:3000"]
    try:
        _watch(urls, interval, once, api_key)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, OSError):
            reason = reason.strerror or reason
        if isinstance(error, http.client.HTTPException):
            reason = "it does not speak HTTP"
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            reason = f"{error.reason}: an administrator's --api-key is needed"
        hint = "Start a server with `loraplex serve`, or name its HTTP address with --url."
        typer.echo(f"error: {', '.join(urls)}: {reason}. {hint}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        pass


def _watch(urls: Sequence[str], interval: float, once: bool, api_key: str | None) -> None:
    console = Console(width=width())
    ascii_only = console.options.ascii_only
    if once or not console.is_terminal or console.is_dumb_terminal:  # frames are printed one after another
        for change in islice(_changes(urls, interval, api_key), 1 if once else None):
            typer.echo(frame(change, width(), ascii_only))
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for change in _changes(urls, interval, api_key):
                live.update(Text(frame(change, width(), ascii_only), overflow="fold"), refresh=True)


def _changes(urls: Sequence[str], interval: float, api_key: str | None) -> Iterator[Change]:
    before = _scrape(urls, api_key)
    while True:
        time.sleep(interval)
        now = _scrape(urls, api_key)
        yield Change(before, now)
        before = now


def _scrape(urls: Sequence[str], api_key: str | None) -> Samples:
    texts, headers = [], {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError("a URL must begin with http:// or https://")
        request = urllib.request.Request(f"{url.rstrip('/')}/metrics", headers=headers)
        with open_url(request, 10) as response:
            texts.append(response.read().decode())
    return Samples(time.monotonic(), *texts)


def frame(change: Change, columns: int, ascii_only: bool = False) -> str:
    """The display for the time between two scrapes, for a terminal of this width."""
    parts = _summary(change, columns), _replicas(change, columns, ascii_only), _adapters(change, columns)
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _summary(change: Change, columns: int) -> list[str]:
    now = change.now
    running, waiting = (now.sum("loraplex_sequences", state=state) for state in ("running", "waiting"))
    ended = change.rate("loraplex_requests_total")
    failed = ended - change.rate("loraplex_requests_total", outcome="finished")
    prompt, hits = change.growth("loraplex_prompt_tokens_total"), change.growth("loraplex_prefix_hit_tokens_total")
    models = {sample.labels["model"] for sample in now.find("loraplex_build_info")}
    pairs = (
        f"running {running:.0f}",
        f"waiting {waiting:.0f}",
        f"requests/s {ended:.1f}",
        f"not finished/s {failed:.1f}",
        f"tokens/s {change.rate('loraplex_generated_tokens_total'):.1f}",
        f"first token {_milliseconds(change.mean('loraplex_time_to_first_token_seconds'))}",
        f"between tokens {_milliseconds(change.mean('loraplex_inter_token_seconds'))}",
        f"prefix hits {f'{hits / prompt:.0%}' if prompt else '-'}",
    )
    return [", ".join(sorted(models)) or "loraplex", *pairs_in_lines(pairs, columns)]


def _replicas(change: Change, columns: int, ascii_only: bool) -> list[str]:
    headings = "replica", "running", "waiting", "KV cache", "device", "host", "steps/s", "step", "prefill", "decode"
    rows = [_replica(change, replica, ascii_only) for replica in change.now.values("loraplex_sequences", "replica")]
    if not rows:
        return []
    right = frozenset(headings) - {"replica", "KV cache"} | {"adapters"}
    caption = textwrap.wrap("prefill, decode, adapters: tokens and distinct adapters per step", columns)
    return [*listing((*headings, "adapters"), rows, columns, right), *caption]


def _replica(change: Change, replica: str, ascii_only: bool) -> tuple[str, ...]:
    now = change.now
    steps = change.growth("loraplex_step_duration_seconds_count", replica=replica)
    prefill, decode = (
        change.growth("loraplex_step_tokens_total", replica=replica, phase=phase) / max(1, steps)
        for phase in ("prefill", "decode")
    )
    adapters = change.mean("loraplex_step_adapters", replica=replica)
    return (
        replica,
        f"{now.sum('loraplex_sequences', replica=replica, state='running'):.0f}",
        f"{now.sum('loraplex_sequences', replica=replica, state='waiting'):.0f}",
        _cache_bar(now, replica, BLOCKS_ASCII if ascii_only else BLOCKS),
        f"{now.sum('loraplex_adapters', replica=replica, tier='device'):.0f}"
        f"/{now.sum('loraplex_adapter_slots', replica=replica):.0f}",
        f"{now.sum('loraplex_adapters', replica=replica, tier='host'):.0f}",
        f"{change.rate('loraplex_step_duration_seconds_count', replica=replica):.1f}",
        _milliseconds(change.mean("loraplex_step_duration_seconds", replica=replica)),
        f"{prefill:.1f}",
        f"{decode:.1f}",
        "-" if adapters is None else f"{adapters:.1f}",
    )


def _cache_bar(now: Samples, replica: str, blocks: str) -> str:
    """Blocks in use, then blocks that cache prefixes, then free blocks."""
    used, cached, free = (now.sum("loraplex_kv_blocks", replica=replica, state=s) for s in ("used", "cached", "free"))
    total = max(1.0, used + cached + free)
    full, kept = round(BAR * used / total), round(BAR * (used + cached) / total)
    return f"{blocks[0] * full}{blocks[1] * (kept - full)}{blocks[2] * (BAR - kept)} {used / total:.0%}"


def _adapters(change: Change, columns: int) -> list[str]:
    headings = "adapter", "running", "waiting", "requests/s", "prompt tokens/s", "tokens/s", "wait"
    found = []
    for adapter in change.now.values("loraplex_adapter_sequences", "adapter"):
        states = [
            change.now.sum("loraplex_adapter_sequences", adapter=adapter, state=s) for s in ("running", "waiting")
        ]
        names = ("requests", "adapter_prompt_tokens", "adapter_generated_tokens")
        rates = [change.rate(f"loraplex_{name}_total", adapter=adapter) for name in names]
        found.append((adapter, states, rates))
    if not found:
        return []
    found.sort(key=lambda row: (-sum(row[1]), -row[2][2], -row[2][0], row[0]))
    rows = []
    for adapter, states, rates in found[:MAX_ADAPTERS]:
        wait = _milliseconds(change.mean("loraplex_queue_wait_seconds", adapter=adapter))
        rows.append((adapter, *(f"{state:.0f}" for state in states), *(f"{rate:.1f}" for rate in rates), wait))
    more = [f"and {len(found) - MAX_ADAPTERS} more"] if len(found) > MAX_ADAPTERS else []
    return [*listing(headings, rows, columns, frozenset(headings[1:])), *more]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"
