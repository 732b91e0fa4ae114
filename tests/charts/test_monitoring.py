"""Dashboards, alerts and scrapes of several releases in one cluster do not conflict."""

import json
import re
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from tests.charts.rendering import Object, of_kind, render
from tests.tools import needs_promtool

METRICS = {name: {"enabled": True} for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")}
RELEASES = [("demo", "serving"), ("demo", "other"), ("7b-chat", "serving")]


def objects(release: str = "demo", namespace: str = "serving", **more: object) -> list[Object]:
    return render({"metrics": {**METRICS, **more}}, release, namespace)


def dashboards(made: list[Object]) -> dict[str, Object]:
    """Dashboards by file name."""
    maps = [d for d in of_kind(made, "ConfigMap") if d["metadata"]["labels"].get("grafana_dashboard")]
    return {name: json.loads(text) for config in maps for name, text in config["data"].items()}


def alerts(made: list[Object]) -> list[Object]:
    (rule,) = of_kind(made, "PrometheusRule")
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def queries(made: list[Object]) -> list[str]:
    panels = [panel for dashboard in dashboards(made).values() for panel in dashboard["panels"]]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def selectors(query: str) -> list[dict[str, str]]:
    """The label matchers of each series that a query selects."""
    found: list[dict[str, str]] = []

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append({matcher.name: matcher.value for matcher in node.matchers.matchers})
        return True

    assert promql_parser.walk(promql_parser.parse(query), visit)
    return found


def test_each_releases_dashboards_have_their_own_identities_titles_and_files():
    made = [dashboards(objects(*release)) for release in RELEASES]
    files = [name for one in made for name in one]
    assert len(set(files)) == len(files) == 2 * len(RELEASES)
    for field in ("uid", "title"):
        values = [dashboard[field] for one in made for dashboard in one.values()]
        assert len(set(values)) == len(values)
    assert all(len(dashboard["uid"]) <= 40 for one in made for dashboard in one.values())  # Grafana's limit
    assert "loraplex: service (serving/demo)" in {dashboard["title"] for one in made for dashboard in one.values()}


@pytest.mark.parametrize(("release", "namespace"), RELEASES)
def test_every_query_selects_the_releases_series_by_its_monitors_labels(release: str, namespace: str):
    made = objects(release, namespace)
    (monitor,) = of_kind(made, "ServiceMonitor")
    services = [
        service["metadata"]["name"]
        for service in of_kind(made, "Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        and monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    ]
    # The operator names the job after the Service, and a PodMonitor's job by namespace and name.
    (router_job,) = services
    (pod_monitor,) = of_kind(made, "PodMonitor")
    jobs = {router_job, f"{namespace}/{pod_monitor['metadata']['name']}"}
    asked = queries(made)
    assert asked
    for query in asked:
        for matchers in selectors(query):
            assert matchers["namespace"] == namespace and set(matchers["job"].split("|")) == jobs
    for alert in alerts(made):
        for matchers in selectors(alert["expr"]):
            assert (matchers["namespace"], matchers["job"]) == (namespace, router_job)


def test_no_dashboard_variable_can_select_other_releases():
    for dashboard in dashboards(objects()).values():
        assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource"]
        assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) == {"datasource"}


def test_the_labels_can_be_set_for_a_prometheus_with_other_labels():
    made = objects(selector='cluster="a", job="llm"')
    for query in [*queries(made), *(alert["expr"] for alert in alerts(made))]:
        for matchers in selectors(query):
            assert (matchers["cluster"], matchers["job"]) == ("a", "llm") and "namespace" not in matchers


def test_alerts_of_different_releases_are_distinct():
    for alert in alerts(objects()):
        grouped = re.findall(r"by \(([^)]*)\)", alert["expr"])
        assert all("namespace, job" in labels for labels in grouped)


@needs_promtool
def test_the_absence_of_one_release_is_noticed_while_another_answers(tmp_path: Path):
    (rule,) = of_kind(objects("7b-chat"), "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    there = {"series": 'loraplex_build_info{namespace="serving", job="demo-loraplex"}', "values": "1x60"}
    missing = {"namespace": "serving", "job": "loraplex-7b-chat", "severity": "critical"}
    (alert,) = (alert for alert in alerts(objects("7b-chat")) if alert["alert"] == "LoraplexAbsent")
    expected = {"exp_labels": missing, "exp_annotations": alert["annotations"]}
    asked = {"eval_time": "10m", "alertname": "LoraplexAbsent", "exp_alerts": [expected]}
    test = {"interval": "1m", "input_series": [there], "alert_rule_test": [asked]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_series_that_only_endpoint_pickers_read_are_dropped():
    endpoint = {"relabelings": [{"targetLabel": "cluster", "replacement": "a"}], "scrapeTimeout": "10s"}
    (monitor,) = of_kind(objects(serviceMonitor={"enabled": True, "endpoint": endpoint}), "ServiceMonitor")
    (scraped,) = monitor["spec"]["endpoints"]
    drop = {"sourceLabels": ["__name__"], "regex": "vllm:lora_requests_info", "action": "drop"}
    assert scraped["metricRelabelings"] == [drop]
    assert {name: scraped[name] for name in endpoint} == endpoint
    assert (scraped["port"], scraped["path"], scraped["interval"]) == ("http", "/metrics", "15s")
