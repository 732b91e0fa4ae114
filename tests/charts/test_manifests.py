"""The chart renders objects that Kubernetes accepts and that are consistent with each other."""

import json
import re

import helm_python
import kubernetes_validate
import pytest

from tests.charts.rendering import CASES, CHART, Object, claims, of_kind, pods, render, rendered
from tests.operate.exported import router_names

CUSTOM = {
    "LeaderWorkerSet",
    "ScaledObject",
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
    "HTTPRoute",
    "GRPCRoute",
    "InferencePool",
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("minor", range(29, 35))
def test_manifests_are_strictly_valid(minor: int):
    documents = [d for name, case in CASES.items() if case.since <= minor for d in rendered(name)]
    different = {json.dumps(document): document for document in documents if document["kind"] not in CUSTOM}
    for document in different.values():
        kubernetes_validate.validate(document, f"1.{minor}", strict=True)


def test_together_the_cases_render_every_kind():
    kinds = {document["kind"] for case in CASES for document in rendered(case)}
    assert kinds >= CUSTOM


def test_helm_lint_finds_nothing():
    messages = helm_python.lint(str(CHART), strict=True)["messages"]
    assert [message for message in messages if message["severity"] > 1] == []


@every_case
def test_every_selector_matches_pods_and_only_those_of_its_component(case: str):
    labels = [pod["metadata"]["labels"] for pod in pods(rendered(case))]
    for document in rendered(case):
        for selector in _selectors(document):
            matched = [pod for pod in labels if selector.items() <= pod.items()]
            assert matched, f"{document['kind']} {document['metadata']['name']} selects nothing"
            assert len({pod["app.kubernetes.io/component"] for pod in matched}) == 1


def _selectors(document: Object) -> list[Object]:
    """The pod selectors that use the chart's own labels."""
    found = []
    stack = [document["spec"]] if "spec" in document and document["kind"] != "Pod" else []
    while stack:
        node = stack.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key in ("matchLabels", "selector") and "app.kubernetes.io/component" in value:
                found.append(value)
            elif isinstance(value, dict | list):
                stack.append(value)
    return found


@every_case
def test_each_router_has_its_own_shards(case: str):
    routers = {pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] for pod in pods(rendered(case), "router")}
    shards = [pod["metadata"]["labels"]["loraplex/router"] for pod in pods(rendered(case), "shard")]
    assert routers == set(shards) and len(shards) == len(routers)


@every_case
def test_service_ports_exist_in_containers(case: str):
    by_component = {}
    for component in ("router", "shard"):
        pod = next(pods(rendered(case), component))
        ports = [port for container in pod["spec"]["containers"] for port in container["ports"]]
        assert len({port["containerPort"] for port in ports}) == len({port["name"] for port in ports}) == len(ports)
        assert all(len(port["name"]) <= 15 for port in ports)
        by_component[component] = {port["name"]: port["containerPort"] for port in ports}
        _check_probes(pod)
    for service in of_kind(rendered(case), "Service"):
        ports = by_component[service["spec"]["selector"]["app.kubernetes.io/component"]]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    for monitor in of_kind(rendered(case), "PodMonitor"):
        named = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert named == {name for name in by_component["shard"] if name.startswith("metrics")}
    for policy in of_kind(rendered(case), "NetworkPolicy"):
        ports = by_component[policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]]
        allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert allowed in (ports.keys(), set(ports.values()))
    for pool in of_kind(rendered(case), "InferencePool"):
        assert pool["spec"]["targetPorts"] == [{"number": by_component["router"]["http"]}]


def _check_probes(pod: Object) -> None:
    numbers = {port["containerPort"] for container in pod["spec"]["containers"] for port in container["ports"]}
    names = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
    for container in pod["spec"]["containers"]:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if "grpc" in probe:
                assert probe["grpc"]["port"] in numbers
            else:
                assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in names | numbers


@every_case
def test_routes_lead_to_ports_of_the_service(case: str):
    services = {service["metadata"]["name"]: service["spec"]["ports"] for service in of_kind(rendered(case), "Service")}
    pools = {pool["metadata"]["name"] for pool in of_kind(rendered(case), "InferencePool")}
    pools |= CASES[case].external.get("InferencePool", set())
    for route in of_kind(rendered(case), "HTTPRoute", "GRPCRoute"):
        for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
            if backend.get("kind") == "InferencePool":
                assert backend["name"] in pools
            else:
                wanted = "http" if route["kind"] == "HTTPRoute" else "grpc"
                assert (wanted, backend["port"]) in {(p["name"], p["port"]) for p in services[backend["name"]]}
    for ingress in of_kind(rendered(case), "Ingress"):
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            service = path["backend"]["service"]
            assert service["port"]["name"] in {port["name"] for port in services[service["name"]]}


def test_a_route_without_a_pool_leads_to_the_service():
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gw"}]}}
    (made,) = of_kind(render({"gateway": route}), "HTTPRoute")
    assert made["spec"]["rules"][0]["backendRefs"] == [{"name": "demo-loraplex", "port": 3000}]


@every_case
def test_objects_that_pods_refer_to_exist_or_are_the_users(case: str):
    existing = {kind: set(names) for kind, names in CASES[case].external.items()}
    for document in rendered(case):
        existing.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    referred = {(kind, name) for pod in pods(rendered(case)) for kind, name in _references(pod["spec"])}
    ingresses = of_kind(rendered(case), "Ingress")
    referred |= {("Secret", tls["secretName"]) for ingress in ingresses for tls in ingress["spec"].get("tls", [])}
    for kind, name in referred:
        assert name in existing.get(kind, ()), f"no {kind} {name}"
    referred |= {
        (backend["kind"], backend["name"])
        for route in of_kind(rendered(case), "HTTPRoute")
        for rule in route["spec"]["rules"]
        for backend in rule["backendRefs"]
        if "kind" in backend
    }
    for kind, names in CASES[case].external.items():
        assert names <= {name for referred_kind, name in referred if referred_kind == kind}


def _references(spec: Object) -> list[tuple[str, str]]:
    found = [("Secret", secret["name"]) for secret in spec.get("imagePullSecrets", [])]
    found.append(("ServiceAccount", spec["serviceAccountName"]))
    for volume in spec.get("volumes", []):
        if secret := volume.get("secret"):
            found.append(("Secret", secret["secretName"]))
        if config := volume.get("configMap"):
            found.append(("ConfigMap", config["name"]))
        if claim := volume.get("persistentVolumeClaim"):
            found.append(("PersistentVolumeClaim", claim["claimName"]))
    for container in spec["containers"]:
        for source in container.get("envFrom", []):
            found.append(("Secret", source["secretRef"]["name"]))
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                found.append(("Secret", reference["name"]))
    return found


@every_case
def test_every_mount_has_its_volume_and_every_volume_its_mount(case: str):
    templates = {claim["metadata"]["name"] for document in rendered(case) for claim in claims(document)}
    for pod in pods(rendered(case)):
        volumes = [volume["name"] for volume in pod["spec"].get("volumes", [])]
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in pod["spec"]["containers"]:
            mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
            assert set(mounts) == {*volumes, *(templates if component == "shard" else ())}
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            assert len(paths) == len(set(paths))


@every_case
def test_pods_have_no_rights_that_they_do_not_need(case: str):
    for pod in pods(rendered(case)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"].get("runAsUser") != 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


@every_case
def test_secrets_are_only_referred_to(case: str):
    assert all("stringData" not in secret and "data" not in secret for secret in of_kind(rendered(case), "Secret"))
    for pod in pods(rendered(case)):
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if any(word in variable["name"] for word in ("TOKEN", "KEY", "SECRET")):
                    assert "secretKeyRef" in variable["valueFrom"]


def test_only_a_replicas_router_reaches_its_shards():
    policies = of_kind(rendered("three ranks in each of four replicas of two routers"), "NetworkPolicy")
    of_shards = [policy for policy in policies if "shard" in policy["metadata"]["name"]]
    assert len(of_shards) == 2
    for policy in of_shards:
        rule, metrics = policy["spec"]["ingress"]
        assert [port["port"] for port in metrics["ports"]] == [9400, 9401, 9402]
        (sender,) = rule["from"]
        own = dict(policy["spec"]["podSelector"]["matchLabels"])
        number = own.pop("loraplex/router")
        expected = {**own, "app.kubernetes.io/component": "router", "apps.kubernetes.io/pod-index": number}
        assert sender["podSelector"]["matchLabels"] == expected
        assert [port["port"] for port in rule["ports"]] == [50060, 50061, 50062]


def test_prometheus_reaches_the_routers_metrics_even_if_clients_are_limited():
    (policy,) = (
        policy
        for policy in of_kind(rendered("all optional objects"), "NetworkPolicy")
        if policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    )
    clients, prometheus = policy["spec"]["ingress"]
    assert {"namespaceSelector": {"matchLabels": {"apps": "yes"}}} in clients["from"]
    assert prometheus == {"ports": [{"port": "http"}], "from": [{"podSelector": {}}]}


def test_scalers_scale_the_replicas_and_nothing_else_sets_their_number():
    for case in ("an autoscaler", "KEDA"):
        workloads = of_kind(rendered(case), "StatefulSet", "Deployment")
        sets = {
            document["metadata"]["name"]: document for document in workloads if "shard" in document["metadata"]["name"]
        }
        scalers = of_kind(rendered(case), "HorizontalPodAutoscaler", "ScaledObject")
        assert {scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers} == sets.keys()
        assert all("replicas" not in document["spec"] for document in sets.values())


async def test_scalers_read_the_routers_metric_by_the_monitors_labels():
    exported = await router_names()
    (scaler, _) = of_kind(rendered("an autoscaler"), "HorizontalPodAutoscaler")
    metric = scaler["spec"]["metrics"][0]["external"]["metric"]
    assert metric["name"] in exported
    (keda,) = of_kind(rendered("KEDA"), "ScaledObject")
    query = keda["spec"]["triggers"][0]["metadata"]["query"]
    assert query.startswith(f"sum({metric['name']}{{")
    (monitor,) = of_kind(rendered("all optional objects"), "ServiceMonitor")
    labels = {re.sub(r"[^a-z]", "_", label) for label in monitor["spec"]["podTargetLabels"]}
    for label in labels:
        assert label in metric["selector"]["matchLabels"] and f"{label}=" in query
