"""Invalid values are refused, and all valid ones are documented."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml

from charts.generate import FORMER, PASSED, SETTINGS, readme, schema, setting_properties
from charts.values_file import read_values
from tests.charts.rendering import CHART, Object, pods, render

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_readme_and_the_schema_are_up_to_date():
    values = read_values(CHART / "values.yaml")
    outdated = "run `python -m charts.generate`"
    assert (CHART / "values.schema.json").read_text() == schema(values), outdated
    assert (CHART / "README.md").read_text() == readme(values), outdated


def leaves(values: Object, path: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value and name not in ("settings", "limits", "requests", "endpoint"):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_every_value_and_every_setting_is_documented():
    page = (CHART / "README.md").read_text()
    free_form = ("resources.", "podSecurityContext.", "securityContext.", "dashboards.labels.", ".behavior.")
    for path in leaves(VALUES):
        assert f"`{path}`" in page or any(part in f"{path}." for part in free_form), path
    for component in SETTINGS:
        for name, _ in setting_properties(component):
            assert f"| `{name}` |" in page


@pytest.mark.parametrize(("component", "kind"), SETTINGS.items())
def test_a_setting_is_either_passed_by_the_chart_or_a_value(component: str, kind: Any):
    names = {name.replace("-", "_") for name, _ in setting_properties(component)}
    assert names | PASSED[component] == set(kind.model_fields) and PASSED[component] <= set(kind.model_fields)


def objects_in(node: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for name, child in node.items():
            yield from objects_in(child, f"{path}/{name}")


def test_sections_refuse_unknown_keys():
    whole = json.loads((CHART / "values.schema.json").read_text())
    for path, node in objects_in(whole):
        assert ("properties" in node) == (node.get("additionalProperties") is False), path


@pytest.mark.parametrize(
    "values",
    [
        {"routers": {}},
        {"router": {"replica": 2}},
        {"router": {"replicas": 0}},
        {"router": {"replicas": 1.5}},
        {"router": {"replicas": "2"}},
        {"router": {"service": {"httpPort": 70000}}},
        {"router": {"service": {"type": "ExternalName"}}},
        {"router": {"image": {"digest": "latest"}}},
        {"router": {"settings": {"max_queue": 3}}},
        {"router": {"settings": {"max-queue": 0}}},
        {"router": {"settings": {"drain-seconds": -1}}},
        {"router": {"settings": {"host": "::"}}},
        {"router": {"podDisruptionBudget": {"maxUnavailable": "half"}}},
        {"shard": {"settings": {"tp": 0}}},
        {"shard": {"settings": {"tp": 65}}},
        {"shard": {"settings": {"dtype": "int8"}}},
        {"shard": {"settings": {"rank": 0}}},
        {"shard": {"workload": "DaemonSet"}},
        {"shard": {"startupSeconds": 0}},
        {"shard": {"modelCache": {"size": "20 GB"}}},
        {"shard": {"adapters": {"configMaps": ["sql"]}}},
        {"shard": {"adapters": {"configMaps": [{"id": "../sql", "name": "sql"}]}}},
        {"shard": {"hub": {"token": "hf_x"}}},
        {"shard": {"adapters": {"s3": {"url": "bucket"}}}},
        {"shard": {"adapters": {"gcs": {"url": "s3://bucket"}}}},
        {"router": {"batches": {"s3": {"url": "bucket"}}}},
        {"shard": {"adapters": {"azure": {"url": "https://account.blob.core.windows.net/container"}}}},
        {"keda": {"serverAddress": "prometheus"}},
        {"keda": {"minReplicas": 0}},
        {"gateway": {"inferencePool": {"failureMode": "Open"}}},
        {"metrics": {"serviceMonitor": {"interval": "soon"}}},
        {"test": {"prompt": ""}},
    ],
)
def test_unknown_keys_and_bad_values_are_refused(values: Object):
    with pytest.raises(helm_python.HelmValuesError):
        render(values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}}, "enable one"),
        (
            {"router": {"batches": {"s3": {"url": "s3://one"}}, "settings": {"batches": "/batches"}}},
            "set one of router.batches.s3.url, router.settings.batches",
        ),
        ({"autoscaling": {"enabled": True, "minReplicas": 5}}, "above autoscaling.maxReplicas"),
        ({"autoscaling": {"enabled": True}, "shard": {"workload": "LeaderWorkerSet"}}, "addresses"),
        ({"keda": {"enabled": True}}, "keda.serverAddress"),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "name the Gateway"),
        ({"mtls": {"routerSecret": "cert"}}, "or neither"),
        ({"router": {"adapterRegistry": {"existingClaim": "a", "existingConfigMap": "b"}}}, "not both"),
        (
            {"shard": {"adapters": {"existingClaim": "a", "configMaps": [{"id": "a", "name": "a"}]}}},
            "shard.adapters",
        ),
        (
            {"shard": {"settings": {"tp": 2}, "podSpec": {"containers": [{"name": "rank-0", "env": []}]}}},
            "shard.podSpec.containers: rank-0 has no image. The chart's own container is named shard",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_the_reason(values: Object, reason: str):
    with pytest.raises(helm_python.HelmRenderError, match=reason):
        render(values)


@pytest.mark.parametrize(("path", "instead"), FORMER.items())
def test_values_of_earlier_versions_and_other_charts_are_refused_with_what_to_do_instead(path: str, instead: str):
    values = functools.reduce(lambda inner, name: {name: inner}, reversed(path.split(".")), "0")
    with pytest.raises(helm_python.HelmRenderError, match=f"{path} {instead}"):
        render(values)


def test_helms_globals_and_numbers_from_the_command_line_are_accepted():
    given = helm_python.parse_set_json('shard.settings={"kv-blocks": 100000000}')
    (shard,) = pods(render({"global": {"region": "eu"}, **given}), "shard")
    assert "--kv-blocks=100000000" in shard["spec"]["containers"][0]["args"]
