"""One message to the base model and to each adapter at the same time, streaming side by side.

make serve                                                 # in another terminal
.venv/bin/python examples/side_by_side.py                  # --svg FILE keeps the last frame as a picture
"""

import argparse
import asyncio
import re
from io import StringIO
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel

from loraplex import AsyncClient

MESSAGE = (
    "Anna Schmidt loved the new Berlin office of Google. Show all offices in Berlin with a rating above 4. "
    "Table offices(id, company, city, rating)."
)
ADAPTERS = (None, "sql", "entities", "sentiment")
PICTURE_WIDTH = 116
NARROWEST = 24  # columns of an answer; where the terminal has no room for all beside each other, some are below


async def main(server: str, message: str, svg: Path | None) -> None:
    console = Console()
    answers = dict.fromkeys(ADAPTERS, "")

    async def answer(adapter: str | None) -> None:
        async for piece in client.stream([{"role": "user", "content": message}], adapter=adapter, max_new_tokens=64):
            answers[adapter] += piece.text
            live.update(render(message, answers, console.width))

    async with AsyncClient(server) as client:
        with Live(render(message, answers, console.width), console=console, auto_refresh=True) as live:
            await asyncio.gather(*map(answer, ADAPTERS))
    if svg is not None:
        picture = Console(record=True, width=PICTURE_WIDTH, file=StringIO())
        picture.print(render(message, answers, PICTURE_WIDTH))
        text = picture.export_svg(title="one base model, three adapters, one batch")
        svg.write_text(re.sub(r"@font-face {.*?}\s*", "", text, flags=re.DOTALL))  # fonts from elsewhere


def render(message: str, answers: dict[str | None, str], columns: int) -> Panel:
    beside = next(count for count in (len(answers), 2, 1) if count * NARROWEST <= columns - 4 or count == 1)
    width = (columns - 4) // beside
    height = 12 if beside == len(answers) else 6
    panels = [Panel(text, title=name or "base", width=width, height=height) for name, text in answers.items()]
    rows = (Columns(panels[first : first + beside], padding=(0, 0)) for first in range(0, len(panels), beside))
    return Panel(Group(message, "", *rows), title="one message, four answers", width=columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("message", nargs="?", default=MESSAGE)
    parser.add_argument("--server", default="localhost:50051")
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.server, arguments.message, arguments.svg))
