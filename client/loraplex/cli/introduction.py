"""What `loraplex serve` prints once it is ready."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

SHOWN = 3  # adapters

STATEMENT = "Last year Angela Jones left Microsoft and bought a house in Spain."  # suits the examples' adapters
QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"  # for a model without a chat template


def introduction(model: str, server: str, http: str, adapters: Sequence[str], chats: bool = True) -> str:
    """The addresses, and one request to try for each way to call the server, as rich markup.

    server: gRPC's HOST:PORT; http: a URL; adapters: the available ones; chats: whether the model has a chat
    template.
    """
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
    method = "loraplex.v1.GenerationService/GenerateStream"
    lines = (
        f"loraplex serves [bold]{model or 'SmolLM2-135M-Instruct'}[/]",
        f"  gRPC  {server}",
        f"  HTTP  {http}  (OpenAI at /v1, LoRAX at /generate, /docs, /health, /metrics)",
        f"  adapters  {_listed(adapters)}" if adapter else "",
        "",
        "Try it:",
        f'  {bin}loraplex generate "{prompt}"{flag} --server {server}',
        *([f"  {bin}loraplex chat{flag} --server {server}"] if chats else []),
        f"  {bin}python -c {script}",
        f"  {bin}buf curl --protocol grpc --http2-prior-knowledge -d {grpc} http://{server}/{method}",
        f"  curl {http}/v1/{route} -H 'Content-Type: application/json' -d {openai}",
        f"  curl {http}/generate -H 'Content-Type: application/json' -d {lorax}",
    )
    return "\n".join(line if line.startswith("loraplex") else escape(line) for line in lines)


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
