import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import grpc
import pytest

from loraplex import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterReference,
    AdapterTier,
    Client,
    DeadlineError,
    FieldViolation,
    FinishReason,
    GenerationError,
    InvalidRequestError,
    PromptToken,
    Token,
    TokenLogprob,
    TokenSpan,
    UnavailableError,
    Usage,
)
from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from tests.client.scripted import ENDLESS, ScriptedServicer


def test_generate_gives_the_answer(client: Client) -> None:
    generation = client.generate("Count")
    assert generation.text == " one two three"
    assert generation.request_id == "r-1"
    assert generation.adapter_digest == ""
    assert generation.prompt == ()
    sequence = generation.sequences[0]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.usage == Usage(prompt_tokens=5, cached_tokens=2, generated_tokens=3)
    assert sequence.seed is None
    assert sequence.tokens[1] == Token(id=1, text=" two", logprob=None, alternatives=(), bytes=b" two")


def test_generate_returns_everything_that_was_requested(client: Client) -> None:
    generation = client.generate(
        "Count", adapter="sql", n=2, seed=7, logprobs=True, top_logprobs=1, prompt_logprobs=True, prompt_top_logprobs=1
    )
    assert [sequence.seed for sequence in generation.sequences] == [7, 8]
    assert generation.adapter_digest == "d1" * 32
    assert generation.sequences[0].tokens[0] == Token(
        0, " one", -0.5, (TokenLogprob(0, " one", -0.5, b" one"),), b" one"
    )
    likely = TokenLogprob(9, " c\ufffd", -0.125, b" c\xc3")
    first, last = PromptToken(7, "The", None, (), b"The"), PromptToken(8, "\ufffd", -0.25, (likely,), b"\xa9")
    assert generation.prompt == (first, last)


def test_the_options_reach_the_server(client: Client, servicer: ScriptedServicer) -> None:
    client.generate([{"role": "user", "content": "Hi"}], adapter="sql", max_new_tokens=2, top_p=0.5, stop="\n")
    assert servicer.requests == [
        pb.GenerateRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]),
            adapter=pb.AdapterReference(id="sql"),
            sampling=pb.Sampling(top_p=0.5),
            stopping=pb.Stopping(max_new_tokens=2, stop=["\n"]),
            n=1,
            detail=pb.Detail(),
        )
    ]


def test_stream_gives_the_same_text_piece_by_piece(client: Client) -> None:
    pieces = list(client.stream("Count", n=2, seed=7, adapter="sql", prompt_logprobs=True))
    for index in (0, 1):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == " one two three"
        assert [piece.finish_reason for piece in own] == [None, None, None, FinishReason.LENGTH]
        assert [piece.usage for piece in own] == [None, None, None, Usage(5, 2, 3)]
        assert [piece.seed for piece in own] == [None, None, None, 7 + index]
        assert [piece.adapter_digest for piece in own] == ["d1" * 32, "", "", ""]
    assert [len(piece.prompt) for piece in pieces] == [2, 0, 0, 0, 0, 0, 0, 0]


def test_a_stream_that_never_begins_sends_nothing(client: Client, servicer: ScriptedServicer) -> None:
    client.stream("Count")
    assert servicer.requests == []


def test_a_bad_value_is_refused_before_a_stream_begins(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="top_k"):
        client.stream("Count", top_k=-1)


def test_leaving_the_loop_cancels_the_request(client: Client, servicer: ScriptedServicer) -> None:
    for piece in client.stream(ENDLESS):
        assert piece.text == " 0"
        break
    assert servicer.left.wait(10)


def test_closing_the_stream_cancels_the_request(client: Client, servicer: ScriptedServicer) -> None:
    stream = client.stream(ENDLESS)
    next(stream)
    assert not servicer.left.is_set()
    stream.close()
    assert servicer.left.wait(10)


@pytest.mark.parametrize("call", ["client.generate('endless')", "list(client.stream('endless'))"])
def test_an_interrupt_cancels_the_request(call: str, address: str, servicer: ScriptedServicer) -> None:
    code = f"from loraplex import Client\nclient = Client({address!r})\n{call}"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not servicer.requests:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate()
        finally:
            process.kill()  # else a test that takes too long would wait for it for ever
    assert "KeyboardInterrupt" in stderr
    assert servicer.left.wait(10)


@pytest.mark.parametrize("call", [Client.generate, lambda *args, **options: list(Client.stream(*args, **options))])
def test_the_timeout_is_a_deadline(call: Callable[..., object], client: Client) -> None:
    with pytest.raises(DeadlineError):
        call(client, ENDLESS, timeout=0.1)


def test_the_servers_error_is_raised(client: Client, servicer: ScriptedServicer) -> None:
    servicer.failures = [AdapterNotFoundError("no adapter 'x'"), GenerationError("not finite")]
    with pytest.raises(AdapterNotFoundError, match="no adapter 'x'"):
        client.generate("Hi", adapter="x")
    with pytest.raises(GenerationError, match="not finite"):
        list(client.stream("Hi"))


def test_a_refused_field_is_named(client: Client, servicer: ScriptedServicer) -> None:
    violation = FieldViolation("sampling.top_p", "must be in (0, 1]")
    servicer.failures = [InvalidRequestError(violation)]
    with pytest.raises(InvalidRequestError) as raised:
        client.generate("Hi", top_p=2)
    assert raised.value.violations == (violation,)


def test_an_error_in_mid_stream_is_raised_after_the_pieces_before_it(
    client: Client, servicer: ScriptedServicer
) -> None:
    servicer.failure_after_first_piece = GenerationError("not finite")
    stream = client.stream("Count")
    assert next(stream).text == " one"
    with pytest.raises(GenerationError, match="not finite"):
        next(stream)


def test_a_missing_server_is_an_unavailable_error() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(UnavailableError, match=r"no server answers at 127\.0\.0\.1:1$"),
    ):
        client.info()


def test_cancel_names_the_request(client: Client, servicer: ScriptedServicer) -> None:
    client.cancel("r-9")
    assert servicer.requests == [pb.CancelGenerationRequest(request_id="r-9")]


def test_tokenize_returns_tokens_and_their_positions(client: Client, servicer: ScriptedServicer) -> None:
    assert client.tokenize("hi", skip_special_tokens=True) == (TokenSpan(104, "h", 0, 1), TokenSpan(105, "i", 1, 2))
    assert servicer.requests == [pb.TokenizeRequest(text="hi", skip_special_tokens=True)]


def test_adapters_lists_what_the_server_has(client: Client) -> None:
    sql, poet = client.adapters()
    assert (sql.id, sql.source, sql.tier, sql.digest) == ("sql", "local", AdapterTier.DISK, "")
    assert (poet.tier, poet.lora_rank, poet.size_bytes) == (AdapterTier.DEVICE, 8, 3_000_000)
    assert (poet.running_sequences, poet.waiting_sequences) == (2, 1)


def test_thousands_of_adapters_are_listed_in_pages(client: Client, servicer: ScriptedServicer) -> None:
    servicer.adapters = [pb.AdapterStatus(id=f"a{number}", source="local") for number in range(2500)]
    assert [adapter.id for adapter in client.adapters()] == [f"a{number}" for number in range(2500)]
    assert [request.page_token for request in servicer.requests] == ["", "1000", "2000"]


def test_an_adapter_that_is_being_fetched_has_no_tier(client: Client, servicer: ScriptedServicer) -> None:
    servicer.adapters = [pb.AdapterStatus(id="org/new", source="hub")]
    assert client.adapters()[0].tier is None


def test_load_and_unload_send_the_reference(client: Client, servicer: ScriptedServicer) -> None:
    adapter = client.load_adapter("org/poet", source="hub", revision="main", token="secret")
    assert (adapter.id, adapter.tier) == ("org/poet", AdapterTier.HOST)
    client.unload_adapter("org/poet", source="hub", revision="main")
    assert servicer.requests == [
        pb.LoadAdapterRequest(
            adapter=pb.AdapterReference(id="org/poet", source="hub", revision="main", token="secret")
        ),
        pb.UnloadAdapterRequest(adapter=pb.AdapterReference(id="org/poet", source="hub", revision="main")),
    ]


def test_pins_send_a_name_or_a_digest(client: Client, servicer: ScriptedServicer) -> None:
    pinned = client.pin_adapter("sql", token="secret")
    assert pinned.pinned and pinned.last_used == 1.5
    assert [(residence.tier, residence.pinned) for residence in pinned.residences] == [(AdapterTier.DEVICE, True)]
    assert client.unpin_adapter(digest="d1" * 32).id == "a,b"
    client.unload_adapter(digest="d1" * 32, wait=True)
    assert servicer.requests == [
        pb.PinAdapterRequest(adapter=pb.AdapterReference(id="sql", token="secret")),
        pb.UnpinAdapterRequest(digest="d1" * 32),
        pb.UnloadAdapterRequest(digest="d1" * 32, wait=True),
    ]
    for both_or_neither in ({}, {"id": "sql", "digest": "d1" * 32}):
        with pytest.raises(InvalidRequestError, match="id or a digest"):
            client.unload_adapter(**both_or_neither)


def test_unloading_an_adapter_in_use_is_refused(client: Client, servicer: ScriptedServicer) -> None:
    servicer.failures = [AdapterInUseError("2 sequences run with it")]
    with pytest.raises(AdapterInUseError):
        client.unload_adapter("sql")


def test_info_describes_the_model(client: Client) -> None:
    info = client.info()
    assert (info.model_id, info.max_model_len, info.has_chat_template) == ("tiny", 64, True)


def test_an_answer_may_be_larger_than_grpcs_default_limit(client: Client, servicer: ScriptedServicer) -> None:
    servicer.words = ["x" * 5_000_000]
    assert len(client.generate("Hi").text) == 5_000_000


def test_credentials_secure_the_channel() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    add_GenerationServiceServicer_to_server(ScriptedServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
    server.start()
    with Client(f"127.0.0.1:{port}", credentials=grpc.local_channel_credentials()) as client:
        assert client.info().model_id == "tiny"
    server.stop(None).wait()


def test_a_client_can_be_shared_between_threads(client: Client) -> None:
    def ask(number: int) -> str:
        return "".join(piece.text for piece in client.stream("Count", adapter=AdapterReference(str(number))))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(16))) == [" one two three"] * 16


class _Silent(BaseHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Keeps the requests out of the tests' output."""


def test_the_error_says_that_a_port_speaks_http() -> None:
    with HTTPServer(("127.0.0.1", 0), _Silent) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with (
            Client(f"127.0.0.1:{server.server_port}") as client,
            pytest.raises(UnavailableError, match="answers HTTP, not gRPC: give the address of the server's gRPC port"),
        ):
            client.info(timeout=10)
        server.shutdown()


@pytest.mark.parametrize("server", ["", "http://localhost:3000"])
def test_an_invalid_address_is_refused_at_once(server: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Client(server)


def test_a_host_that_cannot_be_resolved_is_named() -> None:
    with (
        Client("no-such-host.invalid:50051") as client,
        pytest.raises(UnavailableError, match="cannot be resolved"),
    ):
        client.info(timeout=10)


def test_the_error_says_that_the_timeout_passed(client: Client) -> None:
    with pytest.raises(DeadlineError, match="the server did not answer within the timeout"):
        client.generate(ENDLESS, timeout=0.3)


def test_a_proxy_of_the_environment_is_named_and_is_not_for_this_machine(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Client(address) as client:
        assert client.info().model_id == "tiny"
    with (
        Client(address.replace("127.0.0.1", "127.0.0.2"), max_retries=0) as client,
        pytest.raises(UnavailableError, match="the proxy in http_proxy, unless no_proxy names the server"),
    ):
        client.info(timeout=60)


def test_the_error_says_that_a_server_does_not_speak_tls(address: str) -> None:
    with (
        Client(f"https://{address}", max_retries=0) as client,
        pytest.raises(UnavailableError, match="does not speak TLS: leave out https:// and credentials"),
    ):
        client.info(timeout=60)
