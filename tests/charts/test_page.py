"""docs/kubernetes.md: its helm commands, as far as they run without a cluster, and its other files and names."""

import argparse
import re
import shlex
from pathlib import Path

import helm_python
import pytest
import yaml

from tests.charts.rendering import CHART, Object, of_kind, pods, render
from tests.operate.exported import router_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
FILES = dict(re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^\$ (.*)$", re.sub(r" \\\n +", " ", PAGE), re.MULTILINE)
HELM = [command for command in COMMANDS if re.match(r"helm (install|upgrade) ", command)]


def values_of(command: str) -> Object:
    """The values that a `helm install` or `helm upgrade` sets: files before flags, as Helm does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--namespace")
    parser.add_argument("--values", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("release")
    parser.add_argument("chart")
    given = parser.parse_args(shlex.split(command)[2:])
    assert given.release == "demo" and (ROOT / given.chart).samefile(CHART)
    values: Object = {}
    for part in [
        *(yaml.safe_load(FILES[name]) for name in given.values),
        *map(helm_python.parse_set_string, given.set),
    ]:
        values = merged(values, part)
    return values


def merged(base: Object, over: Object) -> Object:
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **both}


@pytest.mark.parametrize("command", HELM)
def test_a_helm_command_renders_valid_manifests(command: str):
    objects = render(values_of(command))
    for component in ("router", "shard"):
        for pod in pods(objects, component):
            image = pod["spec"]["containers"][0]["image"]
            assert image == f"registry.example/loraplex/{component}:0.1.0"


def test_the_page_shows_each_way_to_scale():
    kinds = {document["kind"] for command in HELM for document in render(values_of(command))}
    assert {"ScaledObject", "LeaderWorkerSet", "HTTPRoute", "GRPCRoute", "InferencePool", "PodMonitor"} <= kinds


async def test_the_metrics_adapter_uses_metrics_that_routers_export():
    queries = [rule["seriesQuery"] for rule in yaml.safe_load(FILES["prometheus-adapter.yaml"])["rules"]["external"]]
    assert {query.partition("{")[0] for query in queries} < await router_names()
    assert yaml.safe_load((CHART / "values.yaml").read_text())["autoscaling"]["metric"] in queries[0]


def test_the_certificates_are_for_the_names_that_routers_verify():
    certificates = list(yaml.safe_load_all(FILES["certificates.yaml"]))
    secrets = {certificate["spec"]["secretName"]: certificate["spec"]["dnsNames"] for certificate in certificates}
    (command,) = (command for command in HELM if "mtls" in command)
    assert "--namespace serving" in command
    values = values_of(command)
    assert secrets.keys() == {values["mtls"]["routerSecret"], values["mtls"]["shardSecret"]}
    (service,) = (d for d in of_kind(render({}), "Service") if "loraplex/router" in d["spec"]["selector"])
    assert secrets[values["mtls"]["shardSecret"]] == [f"{service['metadata']['name']}.serving.svc"]


def test_the_pool_and_the_secrets_have_the_pages_names():
    (pool,) = of_kind(
        render(values_of(next(command for command in HELM if "inference.yaml" in command))), "InferencePool"
    )
    assert f"`{pool['metadata']['name']}`" in PAGE
    picker = yaml.safe_load(FILES["picker.yaml"])["router"]["modelServers"]
    for pod in pods(render(values_of(next(command for command in HELM if "inference.yaml" in command))), "router"):
        assert picker["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert {"number": pod["spec"]["containers"][0]["ports"][0]["containerPort"]} in picker["targetPorts"]
    hub = yaml.safe_load(FILES["values.yaml"])["shard"]["hub"]["existingSecret"]
    key = yaml.safe_load((CHART / "values.yaml").read_text())["shard"]["hub"]["key"]
    assert any(f"create secret generic {hub} --from-literal={key}=" in command for command in COMMANDS)


def test_images_and_values_that_the_page_names_exist():
    dockerfile = (ROOT / "Dockerfile").read_text()
    for target, image in re.findall(r"docker build --target (\w+) --tag registry.example/(\S+):", PAGE):
        assert f" AS {target}\n" in dockerfile and image == f"loraplex/{target}"
    for argument in ("TORCH_INDEX", "BASE", "BUILD_BASE"):
        assert f"ARG {argument}=" in dockerfile and (f"`{argument}`" in PAGE or f"{argument}=" in PAGE)
    page = (CHART / "README.md").read_text()
    for path in re.findall(r"`((?:router|shard|metrics|gateway)\.[A-Za-z.]+)`", PAGE):
        assert f"`{path}`" in page or f"**{path}**" in page, path


def test_the_images_user_is_the_charts():
    users = {pod["spec"]["securityContext"]["runAsUser"] for pod in pods(render({}))}
    (user,) = set(re.findall(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert users == {int(user)}
