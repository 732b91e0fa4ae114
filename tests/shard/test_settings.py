"""A shard's settings: invalid values are refused with the setting's name."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from loraplex_shard.settings import ModelSettings, ShardSettings


def test_defaults_serve_the_embedded_model_on_one_rank() -> None:
    settings = ShardSettings()
    assert (settings.model, settings.dtype, settings.tp, settings.rank) == ("", "auto", 1, 0)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in ShardSettings.model_fields.values())


def test_a_shard_has_all_settings_of_the_model() -> None:
    added = ShardSettings.model_fields.keys() - ModelSettings.model_fields.keys()
    assert added == {
        "rank",
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


@pytest.mark.parametrize("listen", ["127.0.0.1:50060", "[::]:0", "shard-0.shards:50060", "unix:/run/rank-0.sock"])
def test_both_kinds_of_addresses_are_accepted(listen: str) -> None:
    assert ShardSettings(listen=listen).listen == listen


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ShardSettings().rank = 1  # type: ignore[misc]
