"""A small simulation of many replicas: real connections, and fewer loads with affinity than without."""

from pathlib import Path

from bench.simulate_replicas import Load, RoundRobin, draw, simulate
from loraplex_router.replicas.replicas import Replicas


async def test_affinity_stages_and_loads_less_than_round_robin(tmp_path: Path):
    load = Load(replicas=3, adapters=30, slots=6, host_mib=12, warm_up_seconds=1, seconds=2, tokens=2)
    outcomes = {"affinity": await simulate(Replicas, load), "round robin": await simulate(RoundRobin, load)}
    affinity, round_robin = outcomes.values()
    assert len(affinity.waits) == len(round_robin.waits) > 50
    assert affinity.staged < round_robin.staged
    assert affinity.loaded < round_robin.loaded
    draw(outcomes, tmp_path / "affinity.svg")
    assert "round robin" in (tmp_path / "affinity.svg").read_text()
