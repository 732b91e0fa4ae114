"""What `loraplex serve` tells a user once it serves."""

import shutil
import sys
from pathlib import Path


def introduction(model: str, server: str, http: str, folder: Path | None) -> str:
    """The addresses, and a request to try for each way to call the server, as rich markup.

    server: gRPC's HOST:PORT; http: a URL; folder: where the adapters are.
    """
    adapters = sorted(path.parent.name for path in folder.glob("*/adapter_config.json")) if folder else []
    adapter = adapters[0] if adapters else None
    flag = f" --adapter {adapter}" if adapter else ""
    argument = f', adapter="{adapter}"' if adapter else ""
    field = f', "adapter": {{"id": "{adapter}"}}' if adapter else ""
    bin = _bin_folder()
    prompt = "Anna loves the new office in Berlin."
    messages = f'"messages": [{{"role": "user", "content": "{prompt}"}}]'
    chat = f'{{"chat": {{{messages}}}{field}, "stopping": {{"max_new_tokens": 64}}}}'
    openai = f'{{"model": "{adapter or ""}", {messages}, "max_tokens": 64}}'
    parameters = f'"adapter_id": "{adapter}", "max_new_tokens": 32' if adapter else '"max_new_tokens": 32'
    lorax = f'{{"inputs": "{prompt}", "parameters": {{{parameters}}}}}'
    call = f'Client("{server}").generate("Hello", max_new_tokens=32{argument})'
    script = f"from loraplex import Client; print({call}.text)"
    method = "loraplex.v1.GenerationService/GenerateStream"
    lines = (
        f"loraplex serves [bold]{model or 'SmolLM2-135M-Instruct'}[/]",
        f"  gRPC  {server}",
        f"  HTTP  {http}  (OpenAI at /v1, LoRAX at /generate, /docs, /health, /metrics)",
        f"  adapters  {', '.join(adapters)}" if adapter else "",
        "",
        "Try it:",
        f'  {bin}loraplex generate "{prompt}"{flag} --server {server}',
        f"  {bin}loraplex chat{flag} --server {server}",
        f"  {bin}python -c '{script}'",
        f"  {bin}buf curl --protocol grpc --http2-prior-knowledge -d '{chat}' http://{server}/{method}",
        f"  curl {http}/v1/chat/completions -H 'Content-Type: application/json' -d '{openai}'",
        f"  curl {http}/generate -H 'Content-Type: application/json' -d '{lorax}'",
    )
    return "\n".join(lines)


def _bin_folder() -> str:
    """What goes before a command's name, so that it runs where the user is: nothing if it is on the PATH."""
    folder = Path(sys.executable).parent
    if shutil.which("loraplex") == str(folder / "loraplex"):
        return ""
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"
