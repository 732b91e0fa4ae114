"""An update replaces one pod at a time, and waits until the new one is ready."""

import pytest

from tests.charts.rendering import CASES, Object, of_kind, pods, render, rendered

every_case = pytest.mark.parametrize("case", CASES)
LOOK_UP_SECONDS = 30 + 5  # the time for which name servers cache, and the router's own interval


@every_case
def test_routers_are_replaced_one_at_a_time_and_drain_first(case: str):
    (routers,) = (d for d in of_kind(rendered(case), "StatefulSet") if d["metadata"]["name"].endswith("-router"))
    spec = routers["spec"]
    assert spec["updateStrategy"] == {"type": "RollingUpdate"} and spec["minReadySeconds"] > 0
    for pod in pods(rendered(case), "router"):
        assert pod["spec"]["containers"][0]["readinessProbe"]["grpc"]["service"] == "loraplex.v1.GenerationService"
        assert pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"


@every_case
def test_replicas_are_replaced_one_at_a_time_once_the_router_has_found_the_previous_one(case: str):
    for document in of_kind(rendered(case), "StatefulSet", "Deployment"):
        if document["metadata"]["labels"]["app.kubernetes.io/component"] == "shard":
            assert document["spec"]["minReadySeconds"] > LOOK_UP_SECONDS
    for document in of_kind(rendered(case), "LeaderWorkerSet"):
        rolling = document["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
        assert rolling == {"maxUnavailable": 1, "maxSurge": 0}


def test_a_deployments_new_replica_starts_before_an_old_one_stops():
    for document in of_kind(rendered("a new replica before an old one stops"), "Deployment"):
        assert document["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        }
        assert document["spec"]["progressDeadlineSeconds"] > 1800


def test_routers_know_the_replicas_that_an_update_adds_for_a_while():
    update = {"rolloutStrategy": {"rollingUpdateConfiguration": {"maxSurge": 1, "maxUnavailable": 0}}}
    objects = render({"shard": {"workload": "LeaderWorkerSet", "replicas": 2, "workloadSpec": update}})
    (workload,) = of_kind(objects, "LeaderWorkerSet")
    assert workload["spec"]["rolloutStrategy"] == {"type": "RollingUpdate", **update["rolloutStrategy"]}
    (router,) = pods(objects, "router")
    (shards,) = (flag for flag in router["spec"]["containers"][0]["args"] if flag.startswith("--shards="))
    assert [replica.split(".")[0][-1] for replica in shards.split(";")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "changed",
    [
        {"router": {"replicas": 3}},
        {"shard": {"replicas": 4}},
        {"shard": {"settings": {"dtype": "float16"}}, "router": {"settings": {"max-queue": 7}}},
        {"metrics": {"serviceMonitor": {"enabled": True}}, "commonAnnotations": {"a": "b"}},
        {"shard": {"image": {"tag": "0.2.0"}}, "router": {"image": {"tag": "0.2.0"}}},
    ],
)
def test_an_update_changes_no_immutable_fields(changed: Object):
    before, after = (
        {
            (document["kind"], document["metadata"]["name"]): [
                document["spec"].get(name)
                for name in ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates")
            ]
            for document in of_kind(objects, "StatefulSet", "Deployment")
        }
        for objects in (render({}), render(changed))
    )
    assert before.items() <= after.items()
