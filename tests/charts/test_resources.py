"""GPUs and memory: a rank uses what it requests, and limits are not exceeded."""

import helm_python
import pytest

from tests.charts.rendering import Object, pods, render


def flags(shard: Object) -> list[str]:
    (pod,) = pods(render({"shard": shard}), "shard")
    return [flag for flag in pod["spec"]["containers"][0]["args"] if flag.startswith("--device")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvidia.com/gpu", "limits"),
        ("nvidia.com/gpu", "requests"),
        ("nvidia.com/gpu.shared", "limits"),
        ("nvidia.com/mig-3g.40gb", "limits"),
        ("amd.com/gpu", "limits"),
    ],
)
@pytest.mark.parametrize("count", [1, "1"])
def test_a_rank_that_requests_a_gpu_does_not_fall_back_to_the_cpu(name: str, kind: str, count: object):
    resources = {kind: {name: count}}
    assert flags({"resources": resources}) == ["--device=cuda"]
    assert flags({"resources": resources, "settings": {"device": "auto"}}) == ["--device=cuda"]
    with pytest.raises(helm_python.HelmRenderError, match=f"device is cpu, but shard.resources request {name}"):
        flags({"resources": resources, "settings": {"device": "cpu"}})


@pytest.mark.parametrize("resources", [{}, {"limits": {"nvidia.com/gpu": 0}}, {"limits": {"nvidia.com/gpumem": 4000}}])
def test_a_rank_without_a_gpu_request_uses_any_device(resources: Object):
    assert flags({"resources": resources}) == []
    assert flags({"resources": resources, "settings": {"device": "cpu"}}) == ["--device=cpu"]


def test_what_is_compiled_for_a_gpu_is_kept_beside_the_model():
    for resources, folder in ({}, None), ({"limits": {"nvidia.com/gpu": 1}}, "/cache/triton"):
        (pod,) = pods(render({"shard": {"resources": resources}}), "shard")
        (container,) = pod["spec"]["containers"]
        assert {each["name"]: each.get("value") for each in container["env"]}.get("TRITON_CACHE_DIR") == folder
        assert any(mount["mountPath"] == "/cache" for mount in container["volumeMounts"])


@pytest.mark.parametrize(
    ("gpus", "tp", "nodes", "fits"),
    [(1, 1, 1, True), ("4", 4, 1, True), (2, 4, 2, True), (4, 1, 1, False), (1, 2, 1, False)],
)
def test_a_pod_has_a_gpu_for_each_of_its_ranks(gpus: object, tp: int, nodes: int, fits: bool):
    shard = {"resources": {"limits": {"nvidia.com/gpu": gpus}}, "settings": {"tp": tp}}
    if nodes > 1:
        shard |= {"workload": "LeaderWorkerSet", "nodes": nodes}
    if fits:
        assert flags(shard) == ["--device=cuda"]
    else:
        with pytest.raises(helm_python.HelmRenderError, match=rf"a pod has {tp} ranks .* nvidia.com/gpu is {gpus}"):
            flags(shard)


def test_ranks_are_divided_equally_over_nodes():
    with pytest.raises(helm_python.HelmRenderError, match=r"shard.nodes: only a LeaderWorkerSet's replicas span nodes"):
        render({"shard": {"nodes": 2, "settings": {"tp": 2}}})
    with pytest.raises(helm_python.HelmRenderError, match=r"shard.nodes: the 3 ranks .* divided equally over 2 nodes"):
        render({"shard": {"workload": "LeaderWorkerSet", "nodes": 2, "settings": {"tp": 3}}})


@pytest.mark.parametrize(
    ("memory", "gib", "tp", "fits"),
    [
        ("4Gi", 3.5, 1, True),
        ("4Gi", 4, 1, False),
        ("4Gi", 4, 2, False),
        ("4G", 3.8, 1, False),
        ("4500M", 4.1, 1, True),
        (5_000_000_000, 4.6, 1, True),
        (5_000_000_000, 4.7, 1, False),
        ("5e9", 4.6, 1, True),
        ("1.5Ti", 1024, 1, True),
    ],
)
def test_adapters_cannot_have_more_memory_than_the_ranks(memory: object, gib: float, tp: int, fits: bool):
    shard = {"resources": {"limits": {"memory": memory}}, "settings": {"tp": tp}}
    values = {"router": {"settings": {"adapter-host-gib": gib}}, "shard": shard}
    if fits:
        assert render(values)
    else:
        with pytest.raises(helm_python.HelmRenderError, match=r"router\.settings\.adapter-host-gib"):
            render(values)


def test_shared_memory_is_part_of_the_memory():
    with pytest.raises(helm_python.HelmRenderError, match=r"shard.sharedMemory \(8Gi\) .* \(4Gi\)"):
        render({"shard": {"sharedMemory": "8Gi"}})
    assert render({"shard": {"sharedMemory": "8Gi", "resources": {"limits": {"memory": None}}}})


def test_by_default_the_shards_say_how_much_adapters_may_take():
    (router,) = pods(render({}), "router")
    assert not any("adapter-host-gib" in flag for flag in router["spec"]["containers"][0]["args"])


@pytest.mark.parametrize("workload", ["StatefulSet", "LeaderWorkerSet"])
def test_a_persistent_cache_is_a_claim_of_the_pod(workload: str):
    cache = {"persistent": True, "size": "7Gi"}
    objects = render({"shard": {"workload": workload, "modelCache": cache}})
    (spec,) = (d["spec"] for d in objects if d["kind"] == workload and "shard" in d["metadata"]["name"])
    (claim,) = spec.get("leaderWorkerTemplate", spec)["volumeClaimTemplates"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "7Gi"}}


def test_a_deployment_cannot_have_a_persistent_cache():
    values = {"workload": "Deployment", "modelCache": {"persistent": True}}
    with pytest.raises(helm_python.HelmRenderError, match="cannot have claims of their own"):
        render({"shard": values})
    assert render({"shard": {**values, "modelCache": {"persistent": True, "existingClaim": "models"}}})
