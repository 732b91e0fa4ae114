import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.client.scripted import ScriptedServicer, serving


@pytest.fixture
def servicer() -> ScriptedServicer:
    return ScriptedServicer()


@pytest.fixture
def address(servicer: ScriptedServicer) -> Iterator[str]:
    with serving(servicer) as address:
        yield address


class StandInOpenAi:
    """Streams the requested number of tokens: the second without text, the last with the usage.

    Its answers are chunked even for an HTTP/1.0 client, like uvicorn's.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.address = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        status = "200 OK"
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            lines = [json.dumps({"data": [{"id": "base"}, {"id": "sql"}, {"id": "poet"}]})]
        elif head.startswith("POST /v1/completions "):
            length = int(head.lower().partition("content-length: ")[2].split()[0])
            body = json.loads(await reader.readexactly(length))
            self.bodies.append(body)
            texts = ["a", ""] + ["b"] * (body["max_tokens"] - 2)
            chunks: list[dict[str, object]] = [{"choices": [{"text": text}]} for text in texts]
            chunks.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            lines = [": a comment", *(f"data: {json.dumps(chunk)}\n" for chunk in chunks), "data: [DONE]\n"]
        else:
            status, lines = "404 Not Found", ["no such path"]
        writer.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for line in lines:
            content = f"{line}\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(content), content))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()


@pytest.fixture
async def openai() -> AsyncIterator[StandInOpenAi]:
    stand_in = StandInOpenAi()
    server = await asyncio.start_server(stand_in.answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    stand_in.address = f"{host}:{port}/v1"
    async with server:
        yield stand_in


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a vocabulary of 50 tokens."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def adapter_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the adapters "one" and "two"."""
    directory = tmp_path_factory.mktemp("adapters")
    for name in ("one", "two"):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.save_pretrained(str(directory / name))
    return directory


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)
