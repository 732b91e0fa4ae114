"""The flags of `loraplex serve`, and the flags with which it starts the ranks."""

import fnmatch
import os
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel, ValidationError

from loraplex.cli.flags import parse, warn_of_variables
from loraplex.cli.flags_help import SUBJECTS, describe
from loraplex.cli.habits import HABITS, VARIABLES
from loraplex.cli.ranks import shard_flags
from loraplex.cli.supervisor import ServeSettings, shards
from loraplex.cli.variables import is_setting
from loraplex_router.settings import RouterSettings
from loraplex_shard.settings import ModelSettings, NodeSettings, ShardSettings


def started_with(settings: ServeSettings, rank: int) -> ShardSettings:
    addresses = [f"unix:/run/{rank}" for rank in range(settings.tp)]
    flags = shard_flags(shards(settings, addresses, "file:///run/rendezvous")[rank])
    node = parse(NodeSettings, flags, "shard", "")
    (shard,) = node.shards(node.rendezvous)
    return shard


def test_a_rank_gets_all_settings_of_the_model():
    settings = ServeSettings(model="org/name", dtype="bfloat16", tp=2, kv_blocks=7, otlp_endpoint="http://collector")
    rank = started_with(settings, 1)
    assert {name: getattr(rank, name) for name in ModelSettings.model_fields} == {
        name: getattr(settings, name) for name in ModelSettings.model_fields
    }
    assert (rank.rank, rank.listen, rank.rendezvous) == (1, "unix:/run/1", "file:///run/rendezvous")


def test_ranks_serve_metrics_on_consecutive_ports():
    settings = ServeSettings(tp=3, metrics_port=9400)
    assert [started_with(settings, rank).metrics_port for rank in range(3)] == [9400, 9401, 9402]
    assert started_with(ServeSettings(tp=3), 2).metrics_port == 0


def test_a_metrics_port_with_too_few_ports_above_it_is_refused():
    with pytest.raises(ValidationError, match="metrics_port: 3 ranks need the ports 65534 to 65536"):
        ServeSettings(tp=3, metrics_port=65534)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("kind", [ServeSettings, RouterSettings, NodeSettings])
def test_the_help_shows_every_flag_in_full_and_fits(kind: type[BaseModel], columns: int):
    text = describe(kind, "serve", "Serves.", "", columns)
    for name in kind.model_fields:
        assert f"  --{name.replace('_', '-')}" in text
    words = [line for line in text.splitlines() if len(line) > columns]
    assert all(len(line.split()) <= 4 and line.lstrip().startswith("--") for line in words)


def test_the_help_is_by_subject(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit):
        parse(ServeSettings, ["--help"], "serve", "Serves.", positional="model")
    shown = capsys.readouterr().out
    assert "Usage: loraplex serve [MODEL] [OPTIONS]" in shown
    places = [shown.index(f"\n{subject}:\n") for subject in SUBJECTS]
    assert places == sorted(places)


def test_each_setting_of_a_subject_exists():
    known = {name for kind in (ServeSettings, RouterSettings, NodeSettings) for name in kind.model_fields}
    assert all(fnmatch.filter(known, pattern) for patterns in SUBJECTS.values() for pattern in patterns)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp=0"], "--tp: Input should be greater than or equal to 1"),
        (["--adapters=/nowhere"], "--adapters: /nowhere is not a directory"),
        (
            ["--metrics-port=65535", "--tp=2"],
            "--metrics-port: 2 ranks need the ports 65535 to 65536; the highest port is 65535",
        ),
    ],
)
def test_a_wrong_setting_is_named_by_its_flag(flags: list[str], message: str):
    with pytest.raises(typer.BadParameter) as refused:
        parse(ServeSettings, flags, "serve", "Serves.", positional="model")
    assert refused.value.message == message


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "org/name"], "there is no --model; here it is MODEL, without a flag"),
        (["org/name", "--tensor-parallel-size=2"], "there is no --tensor-parallel-size; here it is --tp"),
        (["org/name", "--resume", "memory"], "there is no --resume; here it is --store"),
        (["--compile", "--eager-prefill=false"], "there is no --compile; here it is not needed: leave it out"),
        (["--max-batch-total-tokens=4096"], "here it is --kv-blocks; a block has 16 tokens"),
        (["--preloaded-adapter-ids=a"], "here it is not supported: run `loraplex adapters load` after the start"),
        (["--rendezvous=tcp://a:1"], "there is no --rendezvous; it is a flag of `loraplex shard`"),
    ],
)
def test_flags_of_other_servers_are_translated(arguments: list[str], hint: str):
    with pytest.raises(typer.BadParameter, match=hint):
        parse(ServeSettings, arguments, "serve", "Serves.", positional="model")


@pytest.mark.parametrize(
    ("kind", "command", "argument", "hint"),
    [
        (RouterSettings, "router", "--resume=memory", "there is no --resume; here it is --store"),
        (RouterSettings, "router", "--max-batch-tokens=64", "it is a flag of `loraplex shard`"),
        (RouterSettings, "router", "--tensor-parallel-size=2", "`loraplex shard` has --tp"),
        (RouterSettings, "router", "--model-id=org/name", "`loraplex shard` has --model"),
        (NodeSettings, "shard", "--model-id=org/name", "there is no --model-id; here it is --model"),
        (NodeSettings, "shard", "--port=80", "there is no --port; `loraplex router` has --http-port; gRPC"),
    ],
)
def test_flags_are_those_of_the_command(kind: type[BaseModel], command: str, argument: str, hint: str):
    with pytest.raises(typer.BadParameter, match=hint):
        parse(kind, ["--shards=a:1", argument] if command == "router" else [argument], command, "")


def test_a_variable_with_the_name_of_an_earlier_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORAPLEX_RESUME", "")
    assert parse(ServeSettings, [], "serve", "", positional="model").store == ""
    monkeypatch.setenv("LORAPLEX_RESUME", "memory")
    with pytest.raises(typer.BadParameter, match="LORAPLEX_RESUME is now LORAPLEX_STORE"):
        parse(ServeSettings, [], "serve", "", positional="model")
    parse(NodeSettings, [], "shard", "")  # never had it


# What the kubelet sets for Services named loraplex, loraplex-http and loraplex-metrics.
SERVICE_LINKS = {
    "LORAPLEX_SERVICE_HOST": "10.0.0.1",
    "LORAPLEX_SERVICE_PORT": "3000",
    "LORAPLEX_SERVICE_PORT_HTTP": "3000",
    "LORAPLEX_PORT": "tcp://10.0.0.1:3000",
    "LORAPLEX_PORT_3000_TCP": "tcp://10.0.0.1:3000",
    "LORAPLEX_PORT_3000_TCP_PROTO": "tcp",
    "LORAPLEX_PORT_3000_TCP_PORT": "3000",
    "LORAPLEX_PORT_3000_TCP_ADDR": "10.0.0.1",
    "LORAPLEX_HTTP_SERVICE_HOST": "10.0.0.2",
    "LORAPLEX_HTTP_PORT": "tcp://10.0.0.2:80",
    "LORAPLEX_METRICS_PORT": "tcp://[fd00::3]:9400",
}


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if is_setting(name):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("nothing_set")
def test_service_links_of_kubernetes_set_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    settings = parse(ServeSettings, ["--grpc-port=7"], "serve", "", positional="model")
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (3000, 7, 0)
    warn_of_variables(settings, "serve")
    http, metrics = caplog.messages
    assert "LORAPLEX_HTTP_PORT has no effect: Kubernetes has set it to tcp://10.0.0.2:80" in http
    assert "for a Service named loraplex-metrics; `enableServiceLinks: false`" in metrics


@pytest.mark.usefixtures("nothing_set")
def test_variables_that_no_setting_reads_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    for name in ("MAX_BATCH_TOKENS", "MAX_QUEU", "API_KEY", "PORT", "COLOUR", "STORE", "SERVER", "TEST_DEVICE"):
        monkeypatch.setenv(f"LORAPLEX_{name}", "8000")
    monkeypatch.setenv("LORAPLEX_TP", "")
    warn_of_variables(RouterSettings(shards=("a:1",)), "router")
    assert caplog.messages == [
        "LORAPLEX_API_KEY is not a setting of `loraplex router`; "
        "as a flag, it is --api-keys FILE, which holds hashes of keys",
        "LORAPLEX_COLOUR is not a setting of `loraplex router`",
        "LORAPLEX_MAX_BATCH_TOKENS has no effect on `loraplex router`: it is a setting of `loraplex shard`",
        "LORAPLEX_MAX_QUEU is not a setting of `loraplex router`: did you mean LORAPLEX_MAX_QUEUE?",
        "LORAPLEX_PORT is not a setting of `loraplex router`; as a flag, it is --http-port; gRPC has --grpc-port",
    ]


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "VLLM_API_KEY",
            "VLLM_API_KEY has no effect; here it is LORAPLEX_API_KEYS=FILE, which holds hashes of keys; set",
        ),
        (
            "LLAMA_ARG_SSL_KEY_FILE",
            "LLAMA_ARG_SSL_KEY_FILE has no effect; here it is LORAPLEX_TLS_KEY; set that, or unset",
        ),
        ("MODEL_ID", "MODEL_ID has no effect; here it is LORAPLEX_MODEL; set that, or unset the variable"),
    ],
)
def test_a_server_does_not_start_without_the_protection_or_the_model_that_another_server_would_have(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, "secret")
    with pytest.raises(typer.BadParameter, match=message) as refused:
        parse(ServeSettings, [], "serve", "", positional="model")
    assert "secret" not in str(refused.value)
    monkeypatch.setenv(variable, "")
    parse(ServeSettings, [], "serve", "", positional="model")


@pytest.mark.usefixtures("nothing_set")
def test_it_starts_with_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "keys").touch()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("MODEL_ID", "org/name")
    settings = parse(ServeSettings, ["org/name", f"--api-keys={tmp_path}/keys"], "serve", "", positional="model")
    warn_of_variables(settings, "serve")
    assert not [text for text in caplog.messages if "VLLM" in text or "MODEL_ID" in text]
    parse(NodeSettings, ["--model=org/name"], "shard", "")  # asks nobody for a key


@pytest.mark.usefixtures("nothing_set")
def test_variables_of_other_servers_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    values = {"MAX_INPUT_LENGTH": "1024", "PORT": "80", "ADAPTER_ID": "org/adapter", "LLAMA_ARG_CTX_SIZE": "4096"}
    values |= {"API_KEY": "secret", "HF_API_TOKEN": "secret", "TRUST_REMOTE_CODE": "false", "NUM_SHARD": ""}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    warn_of_variables(ServeSettings(), "serve")
    assert caplog.messages == [
        "ADAPTER_ID has no effect; here it is not supported: requests name their adapter",
        "API_KEY has no effect; here it is LORAPLEX_API_KEYS=FILE, which holds hashes of keys",
        "HF_API_TOKEN has no effect; here it is the variable HF_TOKEN",
        "LLAMA_ARG_CTX_SIZE has no effect; here it is LORAPLEX_MAX_MODEL_LEN",
        "MAX_INPUT_LENGTH has no effect; here it is LORAPLEX_MAX_MODEL_LEN",
        "PORT has no effect; here it is LORAPLEX_HTTP_PORT; gRPC has LORAPLEX_GRPC_PORT",
    ]
    caplog.clear()
    monkeypatch.setenv("HF_TOKEN", "secret")
    warn_of_variables(ServeSettings(http_port=80, max_model_len=1024), "serve")
    assert not [text for text in caplog.messages if "PORT " in text or "MAX_INPUT" in text or "HF_API_TOKEN" in text]


def test_what_flags_are_translated_to_exists():
    known = {f"--{name.replace('_', '-')}" for name in ServeSettings.model_fields}
    known |= {"--nodes"}  # of the shard
    named = {word.rstrip(";") for text in HABITS.values() for word in text.split() if word.startswith("--")}
    assert named <= known and not known & HABITS.keys()
    assert {text for text in VARIABLES.values() if text.startswith("--")} <= known | HABITS.keys()


def test_an_adapter_instead_of_a_directory_of_adapters_is_refused(tmp_path: Path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValidationError, match="is itself an adapter: give its parent directory"):
        ServeSettings(adapters=tmp_path)
