"""`loraplex top`: what a server does right now, from its metrics. Knows their names, and nothing else of the server."""

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loraplex.cli.samples import Change, Samples

BAR = 24  # characters
MOST_ADAPTERS = 20  # rows

Urls = Annotated[
    list[str] | None,
    typer.Option("--url", metavar="URL", help="The HTTP address of a router; of several, the sum is shown."),
]
Interval = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks; rates are over them.")]
Once = Annotated[bool, typer.Option("--once", help="Print one frame and end.")]


def top(url: Urls = None, interval: Interval = 2.0, once: Once = False) -> None:
    """Watch a server: queues, adapters, batches and tokens per second."""
    urls = url or ["http://localhost:3000"]
    try:
        _watch(urls, interval, once)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        hint = "Start a server with `loraplex serve`, or name its HTTP address with --url."
        typer.echo(f"error: {', '.join(urls)}: {error}. {hint}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        pass


def _watch(urls: Sequence[str], interval: float, once: bool) -> None:
    console = Console()
    before = _scrape(urls)
    with Live(console=console, screen=not once, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            now = _scrape(urls)
            live.update(frame(Change(before, now)), refresh=True)
            if once:
                return
            before = now


def _scrape(urls: Sequence[str]) -> Samples:
    texts = []
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError("a URL begins with http:// or https://")
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=10) as response:
            texts.append(response.read().decode())
    return Samples(time.monotonic(), *texts)


def frame(change: Change) -> RenderableType:
    """What is shown of the time between two scrapes."""
    return Group(_summary(change), _groups(change), _adapters(change))


def _summary(change: Change) -> Panel:
    now = change.now
    running, waiting = (now.sum("loraplex_sequences", state=state) for state in ("running", "waiting"))
    ended = change.rate("loraplex_requests_total")
    failed = ended - change.rate("loraplex_requests_total", outcome="finished")
    prompt, hits = change.growth("loraplex_prompt_tokens_total"), change.growth("loraplex_prefix_hit_tokens_total")
    lines = (
        f"running {running:.0f}   waiting {waiting:.0f}   requests/s {ended:.1f}   not finished/s {failed:.1f}",
        f"tokens/s {change.rate('loraplex_generated_tokens_total'):.1f}"
        f"   first token {_milliseconds(change.mean('loraplex_time_to_first_token_seconds'))}"
        f"   between tokens {_milliseconds(change.mean('loraplex_inter_token_seconds'))}"
        f"   prefix hits {f'{hits / prompt:.0%}' if prompt else '-'}",
    )
    models = {sample.labels["model"] for sample in now.find("loraplex_build_info")}
    return Panel(Text("\n".join(lines)), title=Text(", ".join(sorted(models)) or "loraplex"), title_align="left")


def _groups(change: Change) -> Table:
    headings = ("running", "waiting", "KV cache", "device", "host", "steps/s", "step", "prefill", "decode", "adapters")
    table = _table("group", *headings, caption="prefill, decode, adapters: tokens and distinct adapters per step")
    for group in change.now.values("loraplex_sequences", "group"):
        steps = change.growth("loraplex_step_duration_seconds_count", group=group)
        rates = [
            change.growth("loraplex_step_tokens_total", group=group, phase=phase) / max(1, steps)
            for phase in ("prefill", "decode")
        ]
        adapters = change.mean("loraplex_step_adapters", group=group)
        table.add_row(
            Text(group),
            *(f"{change.now.sum('loraplex_sequences', group=group, state=s):.0f}" for s in ("running", "waiting")),
            _cache_bar(change.now, group),
            f"{change.now.sum('loraplex_adapters', group=group, tier='device'):.0f}"
            f"/{change.now.sum('loraplex_adapter_slots', group=group):.0f}",
            f"{change.now.sum('loraplex_adapters', group=group, tier='host'):.0f}",
            f"{change.rate('loraplex_step_duration_seconds_count', group=group):.1f}",
            _milliseconds(change.mean("loraplex_step_duration_seconds", group=group)),
            *(f"{rate:.1f}" for rate in rates),
            "-" if adapters is None else f"{adapters:.1f}",
        )
    return table


def _cache_bar(now: Samples, group: str) -> Text:
    """Blocks in use, then those that keep prefixes, then free ones."""
    used, cached, free = (now.sum("loraplex_kv_blocks", group=group, state=s) for s in ("used", "cached", "free"))
    total = max(1.0, used + cached + free)
    full, kept = round(BAR * used / total), round(BAR * (used + cached) / total)
    bar = Text.assemble(("█" * full, "green"), ("▒" * (kept - full), "cyan"), ("░" * (BAR - kept), "dim"))
    return bar.append(f" {used / total:.0%}")


def _adapters(change: Change) -> Table:
    table = _table("adapter", "running", "waiting", "requests/s", "prompt tokens/s", "tokens/s", "wait")
    rows = []
    for adapter in change.now.values("loraplex_adapter_sequences", "adapter"):
        states = [
            change.now.sum("loraplex_adapter_sequences", adapter=adapter, state=s) for s in ("running", "waiting")
        ]
        names = ("requests", "adapter_prompt_tokens", "adapter_generated_tokens")
        rates = [change.rate(f"loraplex_{name}_total", adapter=adapter) for name in names]
        rows.append((adapter, states, rates))
    rows.sort(key=lambda row: (-sum(row[1]), -row[2][2], -row[2][0], row[0]))
    for adapter, states, rates in rows[:MOST_ADAPTERS]:
        wait = change.mean("loraplex_queue_wait_seconds", adapter=adapter)
        counts = (f"{state:.0f}" for state in states)
        table.add_row(Text(adapter), *counts, *(f"{rate:.1f}" for rate in rates), _milliseconds(wait))
    if len(rows) > MOST_ADAPTERS:
        table.caption = f"and {len(rows) - MOST_ADAPTERS} more"
    return table


def _table(name: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    table.add_column(name, max_width=48, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "KV cache" else "right", no_wrap=True)
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"
