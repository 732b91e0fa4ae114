"""Fields of Kubernetes' objects in the values are merged into the chart's objects."""

import helm_python
import kubernetes_validate
import pytest

from tests.charts.rendering import CHART, Object, of_kind, pods, render

# Fields of Kubernetes' objects that people use in other charts.
OVER: Object = {
    "commonAnnotations": {"owner": "nlp"},
    "router": {
        "service": {
            "type": "LoadBalancer",
            "spec": {
                "loadBalancerClass": "internal",
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
                "ports": [{"name": "http", "nodePort": 30080}, {"name": "more", "port": 9000}],
            },
        },
        "podSpec": {
            "initContainers": [{"name": "wait", "image": "busybox", "command": ["true"]}],
            "containers": [{"name": "proxy", "image": "envoy"}],
            "schedulerName": "other",
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["hub"]}],
            "dnsConfig": {"options": [{"name": "ndots", "value": "1"}]},
            "terminationGracePeriodSeconds": 300,
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "ca", "emptyDir": {}}],
        },
        "containerSpec": {
            "livenessProbe": {"failureThreshold": 9},
            "readinessProbe": {"grpc": None, "httpGet": {"path": "/health", "port": "http"}},
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp", "subPath": "a"}, {"name": "ca", "mountPath": "/ca"}],
            "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}],
        },
        "workloadSpec": {"updateStrategy": {"rollingUpdate": {"partition": 1}}, "minReadySeconds": 30},
    },
    "shard": {
        "settings": {"tp": 2},
        "podSpec": {
            "initContainers": [
                {"name": "fetch", "image": "fetcher", "volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}
            ],
            "containers": [{"name": "shard", "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}],
            "schedulerName": "volcano",
            "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "one"}],
        },
        "containerSpec": {
            "startupProbe": {"periodSeconds": 20},
            "lifecycle": {"preStop": {"exec": {"command": ["sleep", "1"]}}},
        },
        "workloadSpec": {"revisionHistoryLimit": 2},
    },
}


def named(things: list[Object], name: str) -> Object:
    (found,) = (thing for thing in things if thing["name"] == name)
    return found


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(OVER)


@pytest.mark.parametrize("minor", range(29, 38))
def test_overridden_manifests_are_strictly_valid(minor: int, objects: list[Object]):
    for document in objects:
        if minor >= 34 or document["metadata"]["name"] != "demo-loraplex-shard-0":  # it has resource claims
            kubernetes_validate.validate(document, f"1.{minor}", strict=True)


def test_a_pod_takes_init_containers_sidecars_and_all_other_fields(objects: list[Object]):
    (router,), (shard,) = pods(objects, "router"), pods(objects, "shard")
    assert [container["name"] for container in router["spec"]["initContainers"]] == ["wait"]
    assert [container["name"] for container in router["spec"]["containers"]] == ["router", "proxy"]
    assert [container["name"] for container in shard["spec"]["containers"]] == ["shard"]
    for name in ("schedulerName", "hostAliases", "dnsConfig", "terminationGracePeriodSeconds"):
        assert router["spec"][name] == OVER["router"]["podSpec"][name]
    assert shard["spec"]["schedulerName"] == "volcano" and shard["spec"]["initContainers"][0]["name"] == "fetch"
    assert router["spec"]["securityContext"]["runAsNonRoot"] and router["spec"]["serviceAccountName"] == "demo-loraplex"


def test_named_items_are_merged_by_name(objects: list[Object]):
    (router,), (shard,) = pods(objects, "router"), pods(objects, "shard")
    assert router["spec"]["volumes"] == OVER["router"]["podSpec"]["volumes"]
    container = named(router["spec"]["containers"], "router")
    assert container["volumeMounts"] == OVER["router"]["containerSpec"]["volumeMounts"]
    assert [variable["name"] for variable in container["env"]] == ["ROUTER", "HTTPS_PROXY"]
    names = [variable["name"] for variable in named(shard["spec"]["containers"], "shard")["env"]]
    assert names[:2] == ["HOME", "HF_HOME"] and names[-1] == "NCCL_DEBUG"
    (service,) = (d for d in of_kind(objects, "Service") if d["metadata"]["name"] == "demo-loraplex")
    assert {port["name"]: (port["port"], port.get("nodePort")) for port in service["spec"]["ports"]} == {
        "http": (3000, 30080),
        "grpc": (50051, None),
        "more": (9000, None),
    }
    assert service["spec"]["loadBalancerClass"] == "internal" and service["spec"]["type"] == "LoadBalancer"


def test_maps_are_merged_and_null_takes_a_field_away(objects: list[Object]):
    (router,), (shard,) = pods(objects, "router"), pods(objects, "shard")
    container = named(router["spec"]["containers"], "router")
    assert container["livenessProbe"]["failureThreshold"] == 9 and container["livenessProbe"]["httpGet"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/health" and "grpc" not in container["readinessProbe"]
    ranks = named(shard["spec"]["containers"], "shard")
    assert ranks["startupProbe"]["periodSeconds"] == 20 and ranks["startupProbe"]["grpc"]
    assert ranks["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "1"]
    router_set, shard_set = of_kind(objects, "StatefulSet")
    assert router_set["spec"]["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 1}}
    assert router_set["spec"]["minReadySeconds"] == 30 and shard_set["spec"]["revisionHistoryLimit"] == 2


def test_large_numbers_and_ambiguous_texts_stay_unchanged():
    spec = {"env": [{"name": "A", "value": "1e6"}, {"name": "B", "value": "yes"}], "ports": [{"containerPort": 9000}]}
    (router,) = pods(
        render({"router": {"containerSpec": spec, "podSpec": {"activeDeadlineSeconds": 100_000_000}}}), "router"
    )
    container = router["spec"]["containers"][0]
    assert {variable["name"]: variable.get("value") for variable in container["env"]} == {
        "ROUTER": None,
        "A": "1e6",
        "B": "yes",
    }
    assert router["spec"]["activeDeadlineSeconds"] == 100_000_000
    assert container["ports"] == [{"containerPort": 9000}]  # not all items have names, so the list is replaced


@pytest.mark.parametrize(
    "values",
    [
        {"router": {"podSpec": {"schedularName": "x"}}},
        {"shard": {"containerSpec": {"livenessprobe": {}}}},
        {"router": {"service": {"spec": {"loadBalancerClas": "x"}}}},
        {"router": {"workloadSpec": {"strategy": {"type": "Recreate"}}}},
    ],
)
def test_unknown_kubernetes_fields_are_refused(values: Object):
    with pytest.raises(helm_python.HelmValuesError):
        render(values)


def test_helm_lint_accepts_them():
    messages = helm_python.lint(str(CHART), values=OVER, strict=True)["messages"]
    assert [message for message in messages if message["severity"] > 1] == []
