import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loraplex import AdapterNotFoundError, Client, FieldViolation, GenerationError, InvalidRequestError
from loraplex.cli.main import app
from loraplex_protos import generation_pb2 as pb
from tests.client.scripted import ENDLESS, ScriptedServicer


def run(*arguments: str, server: str, input: str | None = None, columns: str = "200") -> Result:
    variables = {"LORAPLEX_SERVER": server, "COLUMNS": columns, "HF_TOKEN": ""}
    return CliRunner().invoke(app, arguments, input=input, env=variables)


def generations(servicer: ScriptedServicer) -> list[pb.GenerateRequest]:
    return [request for request in servicer.requests if isinstance(request, pb.GenerateRequest)]


def roles_and_texts(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_help_starts_without_the_services_libraries() -> None:
    code = "import sys; from loraplex.cli.main import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "generate" in out and "serve" in out
    assert not {"torch", "transformers", "pydantic", "numpy", "fastapi", "loraplex_router"} & set(out.split())


def test_generate_asks_as_a_user_and_prints_the_answer(address: str, servicer: ScriptedServicer) -> None:
    result = run(
        "generate", "Count", "--adapter", "sql", "-m", "4", "--stop", "x", "--system", "Be brief", server=address
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, " one two three one\n", "")
    request = generations(servicer)[0]
    assert roles_and_texts(request) == [("system", "Be brief"), ("user", "Count")]
    assert request.adapter.id == "sql"
    assert (request.stopping.max_new_tokens, list(request.stopping.stop)) == (4, ["x"])


def test_generate_reads_its_prompt_from_a_pipe(address: str, servicer: ScriptedServicer) -> None:
    run("generate", "-", server=address, input="Count\nto é\n")
    assert roles_and_texts(generations(servicer)[0]) == [("user", "Count\nto é")]


def test_generate_takes_one_grammar(address: str, servicer: ScriptedServicer, tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "object"}')
    lark.write_text('start: "é"')
    run("generate", "x", "--json-schema", str(schema), server=address)
    run("generate", "x", "--json-schema", "-", server=address, input="true")
    run("generate", "x", "--regex", "[ab]", server=address)
    run("generate", "x", "--choice", "yes", "--choice", "no", server=address)
    run("generate", "x", "--lark", str(lark), server=address)
    first, second, third, fourth, fifth = (request.grammar for request in generations(servicer))
    assert (first.json_schema, second.json_schema, third.regex) == ('{"type": "object"}', "true", "[ab]")
    assert (list(fourth.choice.texts), fifth.lark) == (["yes", "no"], 'start: "é"')
    both = run("generate", "x", "--regex", "a", "--choice", "b", server=address)
    assert both.exit_code == 2 and "give only one of" in both.stderr


def test_generate_raw_continues_the_text_itself(address: str, servicer: ScriptedServicer) -> None:
    assert run("generate", "Count", "--raw", server=address).exit_code == 0
    assert generations(servicer)[0].text == "Count"


def test_generate_raw_refuses_a_system_message(address: str) -> None:
    result = run("generate", "Count", "--raw", "--system", "Be brief", server=address)
    assert result.exit_code == 2
    assert "--system" in result.stderr


def test_an_error_is_one_line_and_exit_code_1(address: str, servicer: ScriptedServicer) -> None:
    servicer.failures = [AdapterNotFoundError("no adapter 'x'")]
    result = run("adapters", "load", "x", server=address)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: no adapter 'x'\n")


def test_a_refused_option_is_named(address: str, servicer: ScriptedServicer) -> None:
    servicer.failures = [InvalidRequestError(FieldViolation("sampling.top_p", "must be in (0, 1]"))]
    result = run("generate", "Count", "--top-p", "3", "--raw", server=address)
    assert (result.exit_code, result.stderr) == (1, "error: sampling.top_p: must be in (0, 1]\n")


def test_an_error_in_mid_answer_begins_a_new_line(address: str, servicer: ScriptedServicer) -> None:
    servicer.failure_after_first_piece = GenerationError("not finite")
    result = run("generate", "Count", server=address)
    assert (result.exit_code, result.output) == (1, " one\nerror: not finite\n")


def test_without_a_server_it_says_how_to_start_one() -> None:
    result = run("info", server="127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "127.0.0.1:1" in result.stderr and "loraplex serve" in result.stderr


def test_a_folder_without_an_adapter_is_not_uploaded(address: str, tmp_path: Path) -> None:
    result = run("adapters", "upload", "policy", str(tmp_path), server=address)
    assert result.exit_code == 2 and "has no adapter_config.json and no .gguf file" in result.output
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").touch()
    result = run("adapters", "upload", "policy", str(tmp_path), server=address)
    assert f"did you mean {tmp_path}/checkpoint-5?" in " ".join(result.output.split())


def test_an_interrupt_ends_the_generation_on_the_server(address: str, servicer: ScriptedServicer) -> None:
    command = [sys.executable, "-m", "loraplex.cli.main", "generate", ENDLESS, "--raw", "--server", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == " 0"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in stderr
    assert servicer.left.wait(10)


def test_chat_keeps_the_history_until_reset(address: str, servicer: ScriptedServicer) -> None:
    lines = "Hi\nAnd then?\n\n/reset\nHi again\n/exit\nnever read\n"
    result = run("chat", "--system", "Be kind", "--adapter", "sql", "-m", "3", input=lines, server=address)
    assert result.exit_code == 0
    assert "tiny with sql" in result.stderr
    assert result.stdout.count(" one two three\n") == 3
    first, second, third = generations(servicer)
    system, answer = ("system", "Be kind"), ("assistant", " one two three")
    assert roles_and_texts(first) == [system, ("user", "Hi")]
    assert roles_and_texts(second) == [system, ("user", "Hi"), answer, ("user", "And then?")]
    assert roles_and_texts(third) == [system, ("user", "Hi again")]
    assert first.adapter.id == "sql"


def test_a_chat_changes_its_adapter_and_its_system_message(address: str, servicer: ScriptedServicer) -> None:
    lines = "/adapter sql\nHi\n/system Be brief\nHi\n/adapter\n//etc is a folder?\n/quit\nnever read\n"
    result = run("chat", "-m", "1", input=lines, server=address)
    assert "/help" in result.stderr.splitlines()[0]
    assert "with sql\nwith the base model\n" in result.stderr
    first, second, third = generations(servicer)
    assert [request.adapter.id for request in (first, second, third)] == ["sql", "sql", ""]
    assert roles_and_texts(first) == [("user", "Hi")]
    assert roles_and_texts(second) == [("system", "Be brief"), ("user", "Hi")]
    assert roles_and_texts(third)[-1] == ("user", "/etc is a folder?")


def test_a_chat_shows_its_help_and_names_unknown_commands(address: str, servicer: ScriptedServicer) -> None:
    result = run("chat", input="/help\n/adpater sql\n", server=address)
    assert "/adapter NAME" in result.stderr and "Unknown command /adpater; /help lists the commands." in result.stderr
    assert generations(servicer) == []


def test_chat_ends_with_its_input(address: str) -> None:
    assert run("chat", input="Hi\n", server=address).exit_code == 0


def test_chat_continues_after_an_error_without_the_message_that_caused_it(
    address: str, servicer: ScriptedServicer
) -> None:
    servicer.failure_after_first_piece = GenerationError("not finite")
    result = run("chat", input="Hi\nHello\n", server=address)
    assert result.exit_code == 0
    assert result.stderr.count("error: not finite\n") == 2
    assert [roles_and_texts(request) for request in generations(servicer)] == [[("user", "Hi")], [("user", "Hello")]]


def test_an_interrupt_in_a_chat_ends_the_answer_and_not_the_chat(address: str, servicer: ScriptedServicer) -> None:
    servicer.words = ["a "] * 100_000  # more than what is read before the interrupt
    command = [sys.executable, "-m", "loraplex.cli.main", "chat", "-m", "1000000", "--server", address]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("Hi\n")
        process.stdin.flush()
        assert process.stdout.read(4) == "> a "
        process.send_signal(signal.SIGINT)
        servicer.words = [" one"]
        _, stderr = process.communicate("/exit\n", timeout=60)
    assert (process.returncode, "Traceback" in stderr) == (0, False)
    assert len(generations(servicer)) == 1


def test_adapters_list_shows_what_the_server_has(address: str) -> None:
    result = run("adapters", "list", server=address)
    _, sql, poet = result.stdout.splitlines()
    assert sql.split() == ["sql", "local", "disk", "0"]
    shown = "org/poet hub c0ffee device, pinned 8 3.0 MB 3 2 h ago"
    assert poet.split() == [*shown.split(), "d1" * 6]
    assert "d1" * 32 in run("adapters", "list", "--digests", server=address).stdout


def test_adapters_list_names_the_labels_of_adapters_that_classify(address: str, servicer: ScriptedServicer) -> None:
    servicer.adapters[0].classifier.labels.extend(["no", "yes"])
    servicer.adapters[1].classifier.MergeFrom(pb.Classifier(of_tokens=True, labels=map(str, range(10))))
    shown = run("adapters", "list", server=address, columns="300").stdout
    assert "classifies texts: no, yes\n" in shown
    assert "classifies tokens: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more" in shown


def test_adapters_list_says_how_far_a_fetch_is_and_why_one_failed(address: str, servicer: ScriptedServicer) -> None:
    states = {"fetched_bytes": 1, "total_bytes": 3, "state": pb.ADAPTER_STATE_FETCHING}
    failed = pb.AdapterStatus(id="sql@2", source="hub", state=pb.ADAPTER_STATE_FAILED, reason="the hub has no 'x'")
    servicer.adapters = [pb.AdapterStatus(id="sql@1", source="hub", **states), failed]
    with Client(address) as client:
        first, second = client.adapters()
    assert (first.state, first.fetched_bytes, first.total_bytes) == ("fetching", 1, 3)
    assert (second.state, second.fetched_bytes, second.reason) == ("failed", None, "the hub has no 'x'")
    shown = run("adapters", "list", server=address, columns="300").stdout
    assert "fetching 33 %" in shown
    assert "failed" in shown
    assert "the hub has no 'x'" in shown


def test_adapters_list_says_how_to_get_adapters(address: str, servicer: ScriptedServicer) -> None:
    servicer.adapters = []
    assert "--adapters DIR" in run("adapters", "list", server=address).stdout


def test_adapters_load_and_unload_send_the_reference(address: str, servicer: ScriptedServicer) -> None:
    result = run(
        "adapters", "load", "org/poet", "--source", "hub", "--revision", "v2", "--token", "secret", server=address
    )
    assert "Loaded org/poet: lora_rank 4" in result.stdout
    assert "secret" not in result.output
    assert run("adapters", "unload", "org/poet", "--revision", "v2", server=address).stdout == "Unloaded org/poet\n"
    assert run("adapters", "pin", "org/poet", server=address).stdout == "Pinned org/poet\n"
    assert run("adapters", "unpin", "--digest", "d1", server=address).stdout == "Unpinned a,b\n"
    assert run("adapters", "unload", "--digest", "d1", "--wait", server=address).stdout == "Unloaded d1\n"
    assert servicer.requests == [
        pb.LoadAdapterRequest(adapter=pb.AdapterReference(id="org/poet", source="hub", revision="v2", token="secret")),
        pb.UnloadAdapterRequest(adapter=pb.AdapterReference(id="org/poet", revision="v2")),
        pb.PinAdapterRequest(adapter=pb.AdapterReference(id="org/poet")),
        pb.UnpinAdapterRequest(digest="d1"),
        pb.UnloadAdapterRequest(digest="d1", wait=True),
    ]


LONG = "org/" + "an-adapter-with-a-long-name" * 3


@pytest.mark.parametrize("columns", ["40", "60", "80", "200"])
def test_names_are_never_cut(address: str, servicer: ScriptedServicer, columns: str) -> None:
    servicer.adapters[0].id = LONG
    servicer.adapters[1].id = "größe"
    shown = run("adapters", "list", server=address, columns=columns).stdout
    assert LONG in shown and "größe" in shown and "…" not in shown
    assert all(len(line) <= int(columns) or LONG in line for line in shown.splitlines())


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LC_ALL", "LANG")}
    whole = [sys.executable, "-m", "loraplex.cli.main", *arguments]
    return subprocess.run(whole, capture_output=True, env=environment | variables, timeout=60, check=False)


def test_through_a_pipe_each_adapter_has_one_line(address: str, servicer: ScriptedServicer) -> None:
    servicer.adapters[0].id = LONG
    result = command("adapters", "list", "--digests", "--server", address)
    assert len(result.stdout.splitlines()) == 1 + len(servicer.adapters)
    assert LONG.encode() in result.stdout


@pytest.mark.parametrize("terminal", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}])
def test_listings_have_no_colours(address: str, terminal: dict[str, str]) -> None:
    assert b"\x1b" not in command("adapters", "list", "--server", address, **terminal).stdout


def test_an_error_of_the_connection_is_one_line(address: str) -> None:
    whole = [
        sys.executable,
        "-c",
        "from loraplex_command import main; main()",
        "info",
        "--server",
        f"https://{address}",
    ]
    shown = subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False).stderr
    assert len(shown.splitlines()) == 1 and "does not speak TLS: leave out https://" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_terminal_lacks_are_not_an_error(
    address: str, servicer: ScriptedServicer, encoding: str
) -> None:
    servicer.adapters[0].id = "größe"
    servicer.words = ["日"]
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    assert command("adapters", "list", "--server", address, **narrow).returncode == 0
    answered = command("generate", "Hi", "-m", "1", "--server", address, **narrow)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == {"ascii": "日\n".encode(), "latin-1": b"\\u65e5\n"}[encoding]  # typer treats C as UTF-8


def test_programs_read_json(address: str) -> None:
    sql, poet = json.loads(run("adapters", "list", "--json", server=address).stdout)
    assert (sql["id"], sql["tier"], poet["state"], poet["digest"]) == ("sql", "disk", "loaded", "d1" * 32)
    assert json.loads(run("info", "--json", server=address).stdout)["max_model_len"] == 64


def test_the_version_is_the_packages() -> None:
    assert run("--version", server="").stdout == f"loraplex {version('loraplex')}\n"


def test_info_shows_the_model(address: str) -> None:
    lines = [line.split() for line in run("info", server=address).stdout.splitlines()]
    assert ["model_id", "tiny"] in lines
    assert ["max_model_len", "64"] in lines


def test_top_refuses_an_interval_that_never_ends() -> None:
    result = CliRunner().invoke(app, ["top", "--url", "http://127.0.0.1:1", "--interval", "inf"])
    assert result.exit_code == 2 and "86400" in result.output


def test_top_reads_the_address_that_batches_go_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://127.0.0.1:1")
    result = CliRunner().invoke(app, ["top", "--once"])
    assert result.exit_code == 1 and "error: http://127.0.0.1:1: Connection refused" in result.stderr
