"""Opens targets by their names on the command line."""

from collections.abc import AsyncIterator
from pathlib import Path

from bench.load import LoadError, Request, Target
from bench.openai_target import CHAT, COMPLETIONS, RESPONSES, OpenAiTarget
from loraplex import AsyncClient

# The names of a target that runs as a process of bench.processes, to be filled in with its addresses.
OVER_GRPC, OVER_HTTP = "grpc://{grpc}", "openai+http://{http}/v1"
OVER_CHAT, OVER_RESPONSES = "openai-chat+http://{http}/v1", "openai-responses+http://{http}/v1"

FORMS = {"openai+http": COMPLETIONS, "openai-chat+http": CHAT, "openai-responses+http": RESPONSES}


def open_target(name: str, adapter_directory: Path | None) -> Target:
    """`grpc://HOST:PORT`, `openai+http://HOST:PORT/v1` (completions; `openai-chat` and `openai-responses` for chat
    completions and responses), or `peft:DIRECTORY` (`peft:default`: the embedded model).

    `adapter_directory` is where `peft:` finds adapters. Raises LoadError for any other name.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "grpc":
            return GrpcTarget(rest.removeprefix("//"))
        case kind if kind in FORMS:
            return OpenAiTarget(rest.removeprefix("//"), FORMS[kind])
        case "peft":
            from bench.peft_target import PeftTarget  # imports torch

            return PeftTarget(rest, adapter_directory)
        case _:
            raise LoadError(f"{name}: a target is grpc://HOST:PORT, openai+http://HOST:PORT/v1 or peft:DIRECTORY")


class GrpcTarget:
    """A loraplex server."""

    def __init__(self, server: str) -> None:
        self._client = AsyncClient(server, max_retries=0)

    async def adapters(self) -> list[str]:
        return [adapter.id for adapter in await self._client.adapters()]

    async def generate(self, request: Request) -> AsyncIterator[int]:
        pieces = self._client.stream(
            request.prompt,
            adapter=request.adapter,
            max_new_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0,
        )
        async for piece in pieces:
            yield len(piece.tokens)

    async def close(self) -> None:
        await self._client.close()
