"""What `loraplex serve` tells the ranks that it starts."""

import pytest
from pydantic import ValidationError

from loraplex.cli.flags import parse
from loraplex.cli.ranks import shard_flags
from loraplex.cli.supervisor import ServeSettings
from loraplex_shard.settings import ModelSettings, ShardSettings


def started_with(settings: ServeSettings, rank: int) -> ShardSettings:
    flags = shard_flags(settings, settings.metrics_port, rank, f"unix:/run/{rank}", "/run/rendezvous")
    return parse(ShardSettings, flags, "shard", "")


def test_a_rank_gets_all_that_is_said_about_the_model():
    settings = ServeSettings(model="org/name", dtype="bfloat16", tp=2, kv_blocks=7, otlp_endpoint="http://collector")
    rank = started_with(settings, 1)
    assert {name: getattr(rank, name) for name in ModelSettings.model_fields} == {
        name: getattr(settings, name) for name in ModelSettings.model_fields
    }
    assert (rank.rank, rank.listen, rank.rendezvous) == (1, "unix:/run/1", "file:///run/rendezvous")


def test_ranks_have_their_metrics_on_ports_that_follow_each_other():
    settings = ServeSettings(tp=3, metrics_port=9400)
    assert [started_with(settings, rank).metrics_port for rank in range(3)] == [9400, 9401, 9402]
    assert started_with(ServeSettings(tp=3), 2).metrics_port == 0


def test_a_port_with_too_few_above_it_is_refused():
    with pytest.raises(ValidationError, match="metrics_port: above 65534 there are no ports for 3 ranks"):
        ServeSettings(tp=3, metrics_port=65534)
