"""The dashboards and alerts use metrics that exist, and alerts fire when they should."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml

from charts.dashboards import DASHBOARDS, FOLDER, write
from tests.operate.exported import router_names, shard_names
from tests.tools import needs_promtool

HERE = Path(__file__).parent
RULES = FOLDER.parent / "rules" / "alerts.yaml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    for path in FOLDER.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (alert["expr"] for alert in ALERTS)


def asked(query: str) -> set[str]:
    """The metrics that a query selects."""
    names: set[str] = set()

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name or "")
        return True

    assert promql_parser.walk(promql_parser.parse(query), visit)
    return names


@pytest.mark.parametrize("query", sorted(set(queries())))
async def test_queries_use_metrics_that_exist(query: str):
    names = asked(query)
    assert names and names <= await router_names() | shard_names()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_dashboard_files_are_up_to_date(name: str):
    assert (FOLDER / f"{name}.json").read_text() == write(name), "run: python -m charts.dashboards"


def test_there_is_one_file_per_dashboard():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(DASHBOARDS)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_distinct_ids_and_do_not_overlap(name: str):
    panels = json.loads(write(name))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_every_alert_is_tested():
    cases = yaml.safe_load((HERE / "alerts_test.yaml").read_text())["tests"]
    tried = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert tried == {alert["alert"] for alert in ALERTS}


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path):
    text = (HERE / "alerts_test.yaml").read_text().replace("RULES", str(RULES))
    (tmp_path / "alerts_test.yaml").write_text(text)
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "alerts_test.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
