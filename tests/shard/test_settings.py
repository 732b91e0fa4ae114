"""A shard's settings: invalid values are refused with the setting's name."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from loraplex_shard.settings import ModelSettings, NodeSettings, ShardSettings


def test_defaults_serve_the_embedded_model_on_one_rank() -> None:
    settings = ShardSettings()
    assert (settings.model, settings.dtype, settings.tp, settings.rank) == ("", "auto", 1, 0)


def test_every_setting_is_described() -> None:
    fields = ShardSettings.model_fields | NodeSettings.model_fields
    assert all(field.description for field in fields.values())


def test_a_shard_has_all_settings_of_the_model() -> None:
    added = ShardSettings.model_fields.keys() - ModelSettings.model_fields.keys()
    assert added == {
        "rank",
        "nodes",
        "listen",
        "rendezvous",
        "metrics_port",
        "drain_seconds",
        "mtls_cert",
        "mtls_key",
        "mtls_ca",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tp", 0),
        ("tp", 65),
        ("rank", -1),
        ("kv_blocks", -1),
        ("max_model_len", -1),
        ("max_sequences", 0),
        ("threads", -1),
        ("dtype", "int3"),
        ("listen", "localhost"),
        ("listen", "unix:"),
        ("rendezvous", "10.0.0.1:29500"),
        ("rendezvous", "tcp://10.0.0.1"),
        ("adapters", "/no/such/directory"),
        ("colour", "red"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        ShardSettings.model_validate({field: value})


def test_a_file_is_not_an_adapter_directory(tmp_path: Path) -> None:
    file = tmp_path / "adapter"
    file.touch()
    with pytest.raises(ValidationError, match=r"adapters: .* is not a directory"):
        ShardSettings(adapters=file)


def test_a_rank_outside_of_its_group_is_refused() -> None:
    with pytest.raises(ValidationError, match="rank: 2 is not one of the ranks 0 to 1 of tp=2"):
        ShardSettings(tp=2, rank=2, rendezvous="tcp://127.0.0.1:29500")


def test_ranks_need_a_rendezvous() -> None:
    with pytest.raises(ValidationError, match="rendezvous: required for tp=2"):
        ShardSettings(tp=2)


def node(**settings: object) -> list[tuple[int, str, int, str]]:
    """Rank, address, metrics port and rendezvous of the ranks that `loraplex shard` runs."""
    shards = NodeSettings.model_validate(settings).shards("file:///own")
    return [(each.rank, each.listen, each.metrics_port, each.rendezvous) for each in shards]


def test_a_command_runs_all_ranks_of_its_machine_at_consecutive_ports() -> None:
    assert node() == [(0, "127.0.0.1:50060", 0, "file:///own")]
    assert node(tp=2, listen="[::]:5", metrics_port=9400) == [
        (0, "[::]:5", 9400, "file:///own"),
        (1, "[::]:6", 9401, "file:///own"),
    ]
    across = {"tp": 6, "nodes": 3, "rendezvous": "tcp://leader:1", "listen": "host:7"}
    assert node(node_rank=2, **across) == [(4, "host:7", 0, "tcp://leader:1"), (5, "host:8", 0, "tcp://leader:1")]
    assert node(tp=2, nodes=2, node_rank=1, rendezvous="tcp://leader:1", listen="unix:/run/1") == [
        (1, "unix:/run/1", 0, "tcp://leader:1")
    ]
    assert node(tp=4, rank=3, rendezvous="tcp://leader:1", listen="host:7") == [(3, "host:7", 0, "tcp://leader:1")]


def test_ranks_know_how_many_share_their_machine() -> None:
    assert ModelSettings(tp=4).local_ranks == 4
    for each in NodeSettings(tp=4, nodes=2, rendezvous="tcp://leader:1").shards(""):
        assert each.local_ranks == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 4, "nodes": 3}, "nodes: 4 ranks cannot be divided equally over 3 machines"),
        ({"tp": 4, "nodes": 2}, "rendezvous: required for tp=4"),
        ({"tp": 2, "rank": 0}, "rendezvous: required for tp=2"),
        ({"tp": 2, "rank": 2, "rendezvous": "tcp://a:1"}, "rank: 2 is not one of the ranks 0 to 1 of tp=2"),
        ({"node_rank": 1}, "node_rank: 1 is not one of the nodes 0 to 0"),
        ({"tp": 2, "listen": "unix:/run/rank"}, "listen: several ranks need HOST:PORT"),
        ({"tp": 3, "listen": "host:65534"}, "listen: 3 ranks need the ports from 65534 on"),
        ({"tp": 3, "metrics_port": 65534}, "metrics_port: 3 ranks need the ports from 65534 on"),
    ],
)
def test_ranks_that_cannot_be_run_are_refused_before_any_starts(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NodeSettings.model_validate(settings)


@pytest.mark.parametrize("listen", ["127.0.0.1:50060", "[::]:0", "shard-0.shards:50060", "unix:/run/rank-0.sock"])
def test_both_kinds_of_addresses_are_accepted(listen: str) -> None:
    assert ShardSettings(listen=listen).listen == listen


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ShardSettings().rank = 1  # type: ignore[misc]
