"""The chart as Helm renders it. Together, the cases use every template."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "charts" / "loraplex"
RELEASE, NAMESPACE = "demo", "serving"

Object = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Values, the objects that they expect in the cluster, and the first Kubernetes version (1.N) that they work
    with."""

    values: Object
    external: dict[str, set[str]] = field(default_factory=dict)
    since: int = 29


CASES = {
    "defaults": Case({}),
    "three ranks in each of four replicas of two routers": Case(
        {"router": {"replicas": 2}, "shard": {"replicas": 4, "settings": {"tp": 3}, "modelCache": {"persistent": True}}}
    ),
    "replicas that span nodes": Case(
        {
            "router": {"replicas": 2},
            "shard": {"workload": "LeaderWorkerSet", "nodes": 2, "replicas": 2, "settings": {"tp": 4}},
        }
    ),
    "replicas that span nodes, with claims": Case(
        {
            "shard": {
                "workload": "LeaderWorkerSet",
                "nodes": 2,
                "settings": {"tp": 2},
                "modelCache": {"persistent": True, "storageClassName": "fast"},
            }
        }
    ),
    "a new replica before an old one stops": Case(
        {"router": {"replicas": 2}, "shard": {"workload": "Deployment", "settings": {"tp": 2}}}
    ),
    "a replica on one node, as a LeaderWorkerSet": Case({"shard": {"workload": "LeaderWorkerSet"}}),
    "a registry of adapters": Case(
        {"router": {"adapterRegistry": {"existingConfigMap": "names"}}}, {"ConfigMap": {"names"}}
    ),
    "a registry of adapters that the API changes, with uploads": Case(
        {"router": {"replicas": 2, "adapterRegistry": {"existingClaim": "names"}}}, {"PersistentVolumeClaim": {"names"}}
    ),
    "the user's secrets and claims": Case(
        {
            "imagePullSecrets": [{"name": "registry"}],
            "router": {"apiKeys": {"existingSecret": "keys"}},
            "shard": {
                "settings": {
                    "model": "org/name",
                    "revision": "main",
                    "max-model-len": 1_000_000,
                    "kv-blocks": 2_000_000,
                },
                "hub": {"endpoint": "https://hub.example", "existingSecret": "hub", "key": "read"},
                "modelCache": {"existingClaim": "models"},
                "adapters": {"existingClaim": "adapters", "subPath": "team/a"},
            },
            "test": {"adapter": "sql", "existingSecret": "one-key"},
        },
        {"Secret": {"registry", "keys", "hub", "one-key"}, "PersistentVolumeClaim": {"models", "adapters"}},
    ),
    "mutual TLS": Case(
        {
            "mtls": {"routerSecret": "router-cert", "shardSecret": "shard-cert"},
            "shard": {"settings": {"tp": 2}},
            "router": {"apiKeys": {"existingSecret": "keys"}},
        },
        {"Secret": {"router-cert", "shard-cert", "keys"}},
    ),
    "adapters in object stores": Case(
        {
            "shard": {
                "adapters": {
                    "s3": {
                        "url": "s3://bucket/adapters",
                        "endpoint": "https://s3.example",
                        "region": "eu-central-1",
                        "existingSecret": "aws",
                    },
                    "gcs": {"url": "gs://bucket/adapters", "existingSecret": "google"},
                    "azure": {"url": "az://container", "account": "account", "existingSecret": "azure"},
                }
            }
        },
        {"Secret": {"aws", "google", "azure"}},
    ),
    "batches in S3": Case(
        {
            "router": {
                "replicas": 2,
                "batches": {
                    "s3": {
                        "url": "s3://bucket/batches",
                        "endpoint": "https://minio.example",
                        "region": "eu-central-1",
                        "existingSecret": "batches",
                    }
                },
            }
        },
        {"Secret": {"batches"}},
    ),
    "batches in Google Cloud Storage": Case(
        {"router": {"batches": {"gcs": {"url": "gs://bucket", "existingSecret": "google"}}}}, {"Secret": {"google"}}
    ),
    "batches in Azure": Case(
        {"router": {"batches": {"azure": {"url": "az://c-1/a/b", "account": "account", "existingSecret": "azure"}}}},
        {"Secret": {"azure"}},
    ),
    "adapters in ConfigMaps": Case(
        {"shard": {"adapters": {"configMaps": [{"id": "sql", "name": "adapter-sql"}, {"id": "x.Y", "name": "y"}]}}},
        {"ConfigMap": {"adapter-sql", "y"}},
    ),
    "a model in an image": Case(
        {"shard": {"modelImage": {"reference": "registry.example/model:1"}, "settings": {"model": "/model"}}}, since=31
    ),
    "an autoscaler": Case({"router": {"replicas": 2}, "autoscaling": {"enabled": True}}),
    "KEDA": Case(
        {
            "shard": {"workload": "Deployment"},
            "keda": {"enabled": True, "serverAddress": "http://prometheus:9090", "spec": {"cooldownPeriod": 60}},
        }
    ),
    "IPv6, and images from a private registry": Case(
        {"listen": "::", "global": {"imageRegistry": "mirror.example:5000/all"}, "shard": {"settings": {"tp": 2}}}
    ),
    "user ids that the cluster assigns": Case(
        {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}
    ),
    "an existing pool": Case(
        {
            "gateway": {
                "httpRoute": {"enabled": True, "parentRefs": [{"name": "gw"}]},
                "inferencePool": {"enabled": True, "existing": "llm-d"},
            },
            "shard": {"settings": {"model": "org/Name_7B.Q4:v1"}},
        },
        {"InferencePool": {"llm-d"}},
    ),
    "GPUs": Case(
        {
            "shard": {
                "image": {"repository": "registry.example/shard", "digest": f"sha256:{'0' * 64}"},
                "settings": {"tp": 2, "dtype": "bfloat16"},
                "runtimeClassName": "nvidia",
                "priorityClassName": "serving",
                "sharedMemory": "2Gi",
                "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "32Gi", "cpu": 8}},
                "nodeSelector": {"gpu": "yes"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "affinity": {"nodeAffinity": {}},
            }
        }
    ),
    "all optional objects": Case(
        {
            "commonLabels": {"team": "nlp"},
            "fullnameOverride": "lp",
            "serviceAccount": {"name": "runner", "annotations": {"role": "a"}},
            "networkPolicy": {
                "clients": [{"namespaceSelector": {"matchLabels": {"apps": "yes"}}}],
                "prometheus": [{"podSelector": {}}],
            },
            "metrics": {
                "serviceMonitor": {"enabled": True, "labels": {"release": "p"}},
                "podMonitor": {"enabled": True},
                "prometheusRule": {"enabled": True, "labels": {"release": "p"}},
                "dashboards": {"enabled": True, "annotations": {"folder": "LLM"}},
            },
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "annotations": {"a": "b"},
                "hosts": ["llm.example", "other.example"],
                "tls": [{"hosts": ["llm.example"], "secretName": "cert"}],
            },
            "gateway": {
                "httpRoute": {"enabled": True, "parentRefs": [{"name": "gw"}], "hostnames": ["llm.example"]},
                "grpcRoute": {"enabled": True, "parentRefs": [{"name": "gw"}], "annotations": {"a": "b"}},
                "inferencePool": {"enabled": True},
            },
            "router": {
                "service": {"type": "LoadBalancer", "annotations": {"a": "b"}, "httpPort": 80, "grpcPort": 443},
                "podLabels": {"a": "b"},
                "podAnnotations": {"c": "d"},
                "extraEnv": [{"name": "A", "value": "b"}],
                "extraEnvFrom": [{"secretRef": {"name": "more"}}],
                "extraVolumes": [{"name": "more", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
            },
            "shard": {
                "podAnnotations": {"c": "d"},
                "extraEnv": [{"name": "A", "value": "b"}],
                "extraEnvFrom": [{"secretRef": {"name": "more"}}],
                "extraVolumes": [{"name": "more", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
                "podDisruptionBudget": {"maxUnavailable": "20%"},
            },
            "extraObjects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}, "data": {}},
                "apiVersion: v1\nkind: Secret\nmetadata: {name: '{{ .Release.Name }}-secret'}",
            ],
        },
        {"Secret": {"cert", "more"}},
    ),
    "no optional objects": Case(
        {
            "serviceAccount": {"create": False},
            "networkPolicy": {"enabled": False},
            "router": {"podDisruptionBudget": {"enabled": False}, "topologySpreadConstraints": []},
            "shard": {"podDisruptionBudget": {"enabled": False}, "topologySpreadConstraints": []},
        },
        {"ServiceAccount": {"default"}},
    ),
}


def render(values: Object, release: str = RELEASE, namespace: str = NAMESPACE) -> list[Object]:
    """The objects rendered from values. Raises HelmValuesError for values that the schema refuses, and HelmRenderError
    for values that a template refuses."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name=release, namespace=namespace)
    manifests = [text for path, text in files.items() if path.endswith(".yaml")]
    return [document for text in manifests for document in yaml.load_all(text, Loader=UniqueKeys) if document]


def notes(values: Object) -> str:
    """What `helm install` prints."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    return next(text for path, text in files.items() if path.endswith("NOTES.txt"))


@cache
def rendered(case: str) -> tuple[Object, ...]:
    """The objects of a case. Callers must not change them."""
    return tuple(render(CASES[case].values))


def of_kind(objects: tuple[Object, ...] | list[Object], *kinds: str) -> list[Object]:
    return [document for document in objects if document["kind"] in kinds]


def pods(objects: tuple[Object, ...] | list[Object], component: str = "") -> Iterator[Object]:
    """The pods as their controllers create them (metadata and spec): each router, and one pod for each workload of
    shards. For one component, or for all, including the test."""
    for document in objects:
        spec = document.get("spec", {})
        template = spec.get("template") or spec.get("leaderWorkerTemplate", {}).get("workerTemplate")
        pod = template or (document if document["kind"] == "Pod" else None)
        if not pod or component not in ("", pod["metadata"]["labels"]["app.kubernetes.io/component"]):
            continue
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "router":
            yield from (_numbered(pod, number) for number in range(spec["replicas"]))
        else:
            yield pod


def _numbered(pod: Object, number: int) -> Object:
    """A pod of a StatefulSet, which labels it with its number. The kubelet inserts the number into the arguments."""
    made: Object = json.loads(json.dumps(pod).replace("$(ROUTER)", str(number)))
    made["metadata"]["labels"]["apps.kubernetes.io/pod-index"] = str(number)
    return made


def claims(document: Object) -> list[Object]:
    """A workload's claim templates."""
    spec = document.get("spec", {})
    found: list[Object] = {**spec, **spec.get("leaderWorkerTemplate", {})}.get("volumeClaimTemplates", [])
    return found


class UniqueKeys(yaml.SafeLoader):
    """Reads YAML as Kubernetes does: a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: duplicate key in {keys}"
        return super().construct_mapping(node, deep)
