"""`loraplex generate`: one prompt, its answer streamed to the terminal."""

from contextlib import closing
from typing import Annotated

import typer

from loraplex.cli.connection import DEFAULT_SERVER, ApiKey, Server, connected
from loraplex.cli.grammar import Choices, JsonSchemaFile, LarkFile, RegexPattern, read_grammar, read_text
from loraplex.cli.output import Answer
from loraplex.cli.sampling import Adapter, MaxNewTokens, Seed, System, Temperature, TopP
from loraplex.options import Message, Prompt


def generate(
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="The prompt; with --raw, the text to continue. -: read from stdin."),
    ],
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text. Can be given several times.")] = None,
    system: System = None,
    json_schema: JsonSchemaFile = None,
    regex: RegexPattern = None,
    choice: Choices = None,
    lark: LarkFile = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Answer PROMPT. Ctrl-C stops the answer.

    A model that has a chat template gets PROMPT as a user's message.
    """
    if raw and system is not None:
        raise typer.BadParameter("cannot be combined with --raw", param_hint="--system")
    grammar = read_grammar(json_schema, regex, choice, lark)
    if prompt == "-":
        prompt = read_text(typer.get_text_stream("stdin", encoding="utf-8"), "PROMPT").removesuffix("\n")  # echo's
    with connected(server, api_key) as client:
        whole: Prompt = prompt if raw or not client.info().has_chat_template else conversation(system, prompt)
        stream = client.stream(
            whole,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            grammar=grammar,
        )
        with closing(stream):
            Answer().show(stream)


def conversation(system: str | None, user: str) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": user}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages
