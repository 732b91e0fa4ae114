"""`loraplex chat`: a conversation in the terminal."""

from contextlib import closing, suppress

import typer

from loraplex import Client, GenerateOptions, LoraplexError
from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Server, connected, show_error
from loraplex.cli.sampling import Adapter, MaxNewTokens, Seed, System, Temperature, TopP
from loraplex.types import Message


def chat(
    adapter: Adapter = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Talk with the model. Ctrl-C stops an answer; /reset forgets the conversation; /exit or Ctrl-D ends it."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    options = GenerateOptions(
        adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with connected(server, api_key) as client:
        info = client.info()
        typer.echo(f"{info.model_id}{f' with {adapter}' if adapter else ''} at {server}. /reset, /exit", err=True)
        converse(client, opening, options, server)


def converse(client: Client, opening: list[Message], options: GenerateOptions, server: str) -> None:
    """Reads lines until the end. A request that fails is forgotten, the conversation goes on."""
    with suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401  gives input() line editing and a history

    messages = list(opening)
    while (line := read_line()) is not None:
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": answer(client, messages, options)})
            except LoraplexError as error:
                messages.pop()
                show_error(error, server)


def read_line() -> str | None:
    """None at the end of the conversation."""
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None
    return None if line == "/exit" else line


def answer(client: Client, messages: list[Message], options: GenerateOptions) -> str:
    """Shows the answer as it comes. Ctrl-C ends it: what was shown by then is the answer."""
    text = ""
    with closing(client.stream(messages, **options)) as stream, suppress(KeyboardInterrupt):
        try:
            for piece in stream:
                typer.echo(piece.text, nl=False)
                text += piece.text
        finally:
            typer.echo()
    return text
