"""What `loraplex serve` prints once it is ready."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from rich.markup import escape

Pooled: TypeAlias = Literal["embed", "classify"]

SHOWN = 3  # adapters

STATEMENT = "Last year Angela Jones left Microsoft and bought a house in Spain."  # suits the examples' adapters
QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"  # for a model without a chat template


def introduction(
    model: str, server: str, http: str, adapters: Sequence[str], chats: bool = True, pooled: Pooled | None = None
) -> str:
    """The addresses, and one request to try for each way to call the server, as rich markup.

    server: gRPC's HOST:PORT, with https:// before it if it speaks TLS; http: a URL; adapters: the available ones;
    chats: whether the model has a chat template; pooled: what to ask of a model without an lm head.
    """
    faces = f"{'' if pooled else 'a playground at /, '}OpenAI at /v1, LoRAX at /{pooled or 'generate'}"
    lines = (
        f"loraplex serves [bold]{model or 'SmolLM2-135M-Instruct'}[/]",
        f"  gRPC  {server}",
        f"  HTTP  {http}  ({faces}, /docs, /health, /metrics)",
        f"  adapters  {_listed(adapters)}" if adapters else "",
        "",
        "Try it:",
        *(_to_pool(pooled, server, http) if pooled else _to_generate(server, http, adapters, chats)),
    )
    return "\n".join(line if line.startswith("loraplex") else escape(line) for line in lines)


def _to_pool(pooled: Pooled, server: str, http: str) -> Sequence[str]:
    over_grpc = _quoted({"inputs": [{"text": STATEMENT}]})
    script = shlex.quote(f'from loraplex import Client; print(Client("{server}").{pooled}({json.dumps(STATEMENT)})[0])')
    openai = [_curl(f"{http}/v1/embeddings", _quoted({"model": "", "input": STATEMENT}))] if pooled == "embed" else []
    return (
        f"  {_bin_folder()}python -c {script}",
        _grpc_call(server, pooled.capitalize(), over_grpc),
        *openai,
        _curl(f"{http}/{pooled}", _quoted({"inputs": STATEMENT})),
    )


def _to_generate(server: str, http: str, adapters: Sequence[str], chats: bool) -> Sequence[str]:
    adapter = adapters[0] if adapters else None
    # A name may contain quotes and spaces, so it is quoted for each language, and the result for the shell.
    flag = f" --adapter {shlex.quote(adapter)}" if adapter else ""
    argument = f", adapter={json.dumps(adapter)}" if adapter else ""
    bin = _bin_folder()
    prompt = (STATEMENT if adapter else QUESTION) if chats else BEGINNING
    messages = [{"role": "user", "content": prompt}]
    named = {"adapter": {"id": adapter}} if adapter else {}
    over_grpc: dict[str, object] = {"chat": {"messages": messages}} if chats else {"text": prompt}
    over_http: dict[str, object] = {"messages": messages} if chats else {"prompt": prompt}
    grpc = _quoted({**over_grpc, **named, "stopping": {"max_new_tokens": 64}})
    openai = _quoted({"model": adapter or "", **over_http, "max_tokens": 64, "temperature": 0})
    route = "chat/completions" if chats else "completions"
    # LoRAX's route continues a text as it is, without the chat template that a chat model's adapters were trained with.
    lorax = _quoted({"inputs": BEGINNING, "parameters": {"max_new_tokens": 8}})
    call = f'Client("{server}").generate({json.dumps(messages if chats else prompt)}, max_new_tokens=64{argument})'
    script = shlex.quote(f"from loraplex import Client; print({call}.text)")
    return (
        f'  {bin}loraplex generate "{prompt}"{flag} --server {server}',
        *([f"  {bin}loraplex chat{flag} --server {server}"] if chats else []),
        f"  {bin}python -c {script}",
        _grpc_call(server, "GenerateStream", grpc),
        _curl(f"{http}/v1/{route}", openai),
        _curl(f"{http}/generate", lorax),
    )


def _grpc_call(server: str, method: str, body: str) -> str:
    url, flags = (server, "") if server.startswith("https://") else (f"http://{server}", " --http2-prior-knowledge")
    path = f"{url}/loraplex.v1.GenerationService/{method}"
    return f"  {_bin_folder()}buf curl --protocol grpc{flags} -d {body} {path}"


def _curl(url: str, body: str) -> str:
    return f"  curl {url} -H 'Content-Type: application/json' -d {body}"


def _listed(adapters: Sequence[str]) -> str:
    more = len(adapters) - SHOWN
    return ", ".join(adapters[:SHOWN]) + (
        f" and {more:,} more: {_bin_folder()}loraplex adapters list" if more > 0 else ""
    )


def _quoted(body: dict[str, object]) -> str:
    return shlex.quote(json.dumps(body, ensure_ascii=False))


def _bin_folder() -> str:
    """The prefix for a command to run it from the user's directory: empty if it is on the PATH."""
    folder = Path(sys.executable).parent
    if shutil.which("loraplex") == str(folder / "loraplex"):
        return ""
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"
