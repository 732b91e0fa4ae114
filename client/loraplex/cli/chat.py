"""`loraplex chat`: a conversation in the terminal."""

from contextlib import closing, suppress

import typer

from loraplex import Client, GenerateOptions, LoraplexError
from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Server, connected, show_error
from loraplex.cli.output import Answer
from loraplex.cli.sampling import Adapter, MaxNewTokens, Seed, System, Temperature, TopP
from loraplex.options import Message

COMMANDS = """/adapter NAME  use this adapter from now on; without NAME, the base model
/system TEXT   start over with this system message, or the model's own
/reset         forget the conversation
/quit          quit (also Ctrl-D)
//TEXT         send /TEXT
Ctrl-C stops an answer."""


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
    """Talk to the model. /help lists the chat's commands."""
    options = GenerateOptions(
        adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with connected(server, api_key) as client:
        model = client.info().model_id
        typer.echo(f"{model}{f' with {adapter}' if adapter else ''} at {server}. /help, /quit", err=True)
        _Conversation(client, system, options).run()


class _Conversation:
    def __init__(self, client: Client, system: str | None, options: GenerateOptions) -> None:
        self._client = client
        self._options = options
        self._messages: list[Message] = []
        self._begin(system)

    def run(self) -> None:
        """Reads lines until the end. A failed request is dropped, and the conversation continues."""
        with suppress(ImportError):  # absent on Windows
            import readline  # noqa: F401  gives input() line editing and a history

        while (line := _read_line()) is not None:
            if line.startswith("//"):
                self._say(line[1:])
            elif line.startswith("/"):
                self._obey(*line.split(maxsplit=1))
            elif line:
                self._say(line)

    def _begin(self, system: str | None) -> None:
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)

    def _obey(self, command: str, argument: str = "") -> None:
        match command:
            case "/help":
                typer.echo(COMMANDS, err=True)
            case "/adapter":
                self._options["adapter"] = argument or None
                typer.echo(f"with {argument}" if argument else "with the base model", err=True)
            case "/system":
                self._begin(argument or None)
            case "/reset":
                self._messages = list(self._opening)
            case _:
                typer.echo(f"Unknown command {command}; /help lists the commands.", err=True)

    def _say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            self._messages.append({"role": "assistant", "content": self._answer()})
        except LoraplexError as error:
            self._messages.pop()
            show_error(error)

    def _answer(self) -> str:
        """Shows the answer as it arrives. Ctrl-C ends it: the answer is the text shown so far."""
        answer = Answer()
        with closing(self._client.stream(self._messages, **self._options)) as stream, suppress(KeyboardInterrupt):
            answer.show(stream)
        return answer.text


def _read_line() -> str | None:
    """None at the end of the conversation."""
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None
    return None if line in ("/quit", "/exit") else line
