"""Odd requests over HTTP: good ones in which something was changed."""

import asyncio
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote

from tests.fuzz.odd import SCALARS, changed, encoded, odd_form

ANSWER_SECONDS = 120
HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True}}
DOCUMENTS = ["some text", "another"]
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "stop": ["a"], "logprobs": 1, "temperature": 0.5}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "stream": True, "n": 2, "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", {"messages": [HI], "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", {"messages": [HI], "max_tokens": 2, "response_format": SCHEMA, "stream": True}),
    ("/v1/responses", {"input": [HI], "max_output_tokens": 20, "instructions": "Be short.", "store": False}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 20, "stream": True}),
    ("/v1/messages", {"model": "m", "messages": [HI], "max_tokens": 2, "system": [{"type": "text", "text": "s"}]}),
    ("/v1/messages", {"model": "m", "messages": [HI], "max_tokens": 2, "stream": True}),
    ("/v1/messages/count_tokens", {"model": "m", "messages": [HI]}),
    ("/v1/embeddings", {"input": ["some", "text"], "encoding_format": "base64"}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "red"}),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ("/load_lora_adapter", {"lora_name": "a", "lora_path": "red", "pinned": True}),
    ("/unload_lora_adapter", {"lora_name": "a"}),
    ("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "adapter_id": "red", "details": True}}),
    ("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "best_of": 1, "seed": 3}}),
    ("/", {"inputs": "Hi", "stream": True, "parameters": {"max_new_tokens": 2, "return_full_text": True}}),
    ("/invocations", {"inputs": "Hi", "parameters": {"max_new_tokens": 2}}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/embed", {"inputs": "Hi", "parameters": {"adapter_id": "red"}}),
    ("/classify", {"inputs": "Hi"}),
    ("/classify_batch", {"inputs": ["Hi"]}),
    ("/score", {"text_1": "Hi", "text_2": DOCUMENTS}),
    ("/rerank", {"query": "Hi", "documents": DOCUMENTS, "top_n": 1}),
    ("/adapters/load", {"id": "red"}),
    ("/adapters/register", {"name": "b", "id": "red"}),
    ("/adapters/alias", {"name": "c", "targets": {"b": 100}}),
    ("/adapters/remove", {"name": "b"}),
    ("/adapters/unload", {"id": "red"}),
    ("/adapters/pin", {"id": "red"}),
    ("/adapters/unpin", {"id": "red"}),
    ("/v1/rerank", {"query": "Hi", "documents": [{"text": "some text"}], "return_documents": True}),
    ("/v1/batches", {"input_file_id": "file-a", "endpoint": "/v1/completions", "completion_window": "24h"}),
]
FORMS = "/v1/files", "/adapters/upload?name=d", "/adapters/upload?name=d&expected_version=1"
PATHS = "/health", "/info", "/metrics", "/adapters?limit=x&after=%00", "/v1/models/%2e%2e%2f", "/openapi.json", "/%ff"
METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND")
HEADERS = (
    *(
        "Content-Type: text/plain",
        "Content-Type: application/json; charset=utf-16",
        "Content-Type: multipart/form-data",
    ),
    *("Content-Type: multipart/form-data; boundary=a", "Content-Encoding: gzip", "Accept: text/event-stream"),
    *("Authorization: Bearer \xff", "Authorization: Basic OjoK", "X-Request-Id: a b", "X-Session-Id: " + "s" * 9000),
    *("X-Api-Key: \x01", "traceparent: 00-0-0-0", "Expect: 100-continue", "Connection: upgrade\r\nUpgrade: h2c"),
    *("Last-Event-ID: 1", "Last-Event-ID: " + "e" * 500, "Priority: u=9", "traceparent: 00-" + "0" * 32 + "-1-01"),
    *("Origin: null", "Cookie: " + "c" * 4000, "Range: bytes=0-", "X-Forwarded-For: ::1"),
)


@dataclass(frozen=True)
class Api:
    """What the server's document has."""

    names: Sequence[str]  # of the fields of all bodies
    routes: Sequence[tuple[str, str, Sequence[str]]]  # method and path, and the names of parameters in the query


def read_api(url: str) -> Api:
    with urllib.request.urlopen(f"{url}/openapi.json") as response:
        document = json.load(response)
    models = document["components"]["schemas"].values()
    names = sorted({name for model in models for name in model.get("properties", ())})
    routes = [
        (method.upper(), path, [each["name"] for each in route.get("parameters", ()) if each["in"] == "query"])
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    ]
    return Api(names, routes)


@dataclass(frozen=True)
class HttpRequest:
    """`pause`: seconds between the two parts; `patience`: how long the client waits for the end of the answer."""

    first: bytes
    rest: bytes
    pause: float
    patience: float

    def __str__(self) -> str:
        return repr((self.first + self.rest)[:1500])


def odd_request(api: Api, dice: Random) -> HttpRequest:
    path, body = dice.choice(GOOD)
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        body = changed(body, api.names, dice)
    content = encoded(body, dice)
    method, headers = "POST", ["Content-Type: application/json"]
    if dice.random() < 0.05:
        path, content = dice.choice(FORMS), odd_form(dice)
        headers = ["Content-Type: multipart/form-data; boundary=a"]
    elif dice.random() < 0.15:
        method, path = odd_call(api, dice)
        content = content if dice.random() < 0.1 else b""
    if dice.random() < 0.1:
        headers = dice.sample(HEADERS, dice.randrange(4))
    if dice.random() < 0.03:
        method = dice.choice(METHODS)
    if dice.random() < 0.05:
        path = dice.choice((*PATHS, path + "/", path + "?a=" + "b" * 3000, path.upper(), "/" + path))
    length, patience = len(content), ANSWER_SECONDS if dice.random() < 0.97 else dice.uniform(0, 0.3)
    if dice.random() < 0.03:
        length, patience = dice.choice((0, length // 2, length + 9, -1, 10**30)), 0.5
    framing, wire = f"Content-Length: {length}", content
    if dice.random() < 0.05:
        size = f"{len(content):x}" if dice.random() < 0.7 else dice.choice(("zz", "-1", "f" * 40))
        framing, patience = "Transfer-Encoding: chunked", 0.5
        wire = f"{size}\r\n".encode() + content + b"\r\n0\r\n\r\n"
    version = "HTTP/1.1" if dice.random() < 0.95 else dice.choice(("HTTP/1.0", "HTTP/3.7", "FTP"))
    head = "\r\n".join([f"{method} {path} {version}", "Host: localhost", "Connection: close", framing, *headers])
    whole = head.encode("latin-1") + b"\r\n\r\n" + wire
    if dice.random() < 0.02:
        patience = 0.5
        whole = dice.choice((b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", dice.randbytes(300)))
    slow = dice.random() < 0.05
    place = dice.randrange(len(whole)) if slow else len(whole)
    return HttpRequest(whole[:place], whole[place:], dice.uniform(0, 0.3) if slow else 0.0, patience)


def odd_call(api: Api, dice: Random) -> tuple[str, str]:
    """A route's method and path, with something for each of its parameters."""

    def some() -> str:
        return quote(str(dice.choice(SCALARS))[:300].encode(errors="replace"), safe=dice.choice(("", "/")))

    method, path, parameters = dice.choice(api.routes)
    parts = [some() if part.startswith("{") else part for part in path.split("/")]
    query = "&".join(f"{name}={some()}" for name in parameters if dice.random() < 0.7)
    return method, "/".join(parts) + f"?{query}" * bool(query)


async def send(port: int, request: HttpRequest) -> tuple[str, str]:
    """Sends it, and returns the answer's status and what is wrong with it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        async with asyncio.timeout(request.patience):
            writer.write(request.first)
            await asyncio.sleep(request.pause)
            writer.write(request.rest)
            while more := await reader.read(2**16):
                answer += more
    except TimeoutError:
        if request.patience == ANSWER_SECONDS:
            return "none", "no answer"
    except ConnectionError:
        pass  # such as for a body that is too large
    finally:
        writer.close()
    wrong = b"HTTP/1.1 500" in answer or b"internal error" in answer
    status = answer[9:12].decode() if answer.startswith(b"HTTP/1") else "none"
    return status, answer.decode(errors="replace") if wrong else ""
