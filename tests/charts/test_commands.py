"""The commands accept what the chart passes to them, and the chart's timeouts are long enough."""

import json
from pathlib import Path

import pytest
import typer

from loraplex.cli.flags import parse
from loraplex.cli.main import app
from loraplex_protos import generation_pb2, shard_pb2
from loraplex_router.settings import RouterSettings
from loraplex_shard.settings import NodeSettings, ShardSettings
from tests.charts.rendering import CASES, NAMESPACE, Object, notes, of_kind, pods, render, rendered

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replaces the containers' file systems, because settings check whether files exist."""
    folder = tmp_path_factory.mktemp("mounts")
    (folder / "adapters").mkdir()
    (folder / "etc/loraplex/mtls").mkdir(parents=True)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (folder / "etc/loraplex/mtls" / name).touch()
    return folder


def router_settings(pod: Object, mounts: Path) -> RouterSettings:
    (container,) = pod["spec"]["containers"]
    command, *flags = (argument.replace("=/", f"={mounts}/") for argument in container["args"])
    assert command == "router"
    return parse(RouterSettings, flags, command, "")


def shard_settings(pod: Object, mounts: Path) -> list[ShardSettings]:
    """The settings of all ranks in the pod; for a LeaderWorkerSet, of the leader."""
    (container,) = pod["spec"]["containers"]
    command, *flags = (argument.replace("=/", f"={mounts}/") for argument in container["args"])
    assert command == "shard"
    leader = [flag.replace("$(NODE_RANK)", "0").replace("$(LWS_LEADER_ADDRESS)", "leader") for flag in flags]
    return parse(NodeSettings, leader, command, "").shards("file:///meeting")


def host(case: str) -> str:
    return str(CASES[case].values.get("listen", "0.0.0.0"))


@every_case
def test_the_flags_of_routers_are_valid_settings(case: str, mounts: Path):
    for pod in pods(rendered(case), "router"):
        settings = router_settings(pod, mounts)
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert (settings.host, settings.http_port, settings.grpc_port) == (host(case), ports["http"], ports["grpc"])


@every_case
def test_the_flags_of_ranks_are_valid_settings(case: str, mounts: Path):
    for pod in pods(rendered(case), "shard"):
        settings = shard_settings(pod, mounts)
        assert [one.rank for one in settings] == list(range(settings[0].local_ranks))
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        for one in settings:
            assert (one.listen.rpartition(":")[0].strip("[]"), one.metrics_port) == (
                host(case),
                ports.pop(f"metrics-{one.rank}"),
            )
            assert one.listen.endswith(f":{ports.pop(f'grpc-{one.rank}')}")
            assert ("[" in one.listen) == (host(case) == "::")
        assert not ports
        assert {one.rendezvous for one in settings} <= {"file:///meeting", "tcp://leader:29500"}


def test_values_reach_the_settings_unchanged(mounts: Path):
    case = "the user's secrets and claims"
    (settings,) = shard_settings(next(pods(rendered(case), "shard")), mounts)
    assert (settings.model, settings.revision, settings.adapters) == ("org/name", "main", mounts / "adapters")
    assert (settings.max_model_len, settings.kv_blocks) == (1_000_000, 2_000_000)
    keys = router_settings(next(pods(rendered(case), "router")), mounts).api_keys
    assert keys == mounts / "etc/loraplex/api-keys/keys.yaml"
    changed = render({"router": {"settings": {"drain-seconds": 0.5, "max-queue": 12345678, "log-prompts": True}}})
    router = router_settings(next(pods(changed, "router")), mounts)
    assert (router.drain_seconds, router.max_queue, router.log_prompts) == (0.5, 12345678, True)


@every_case
def test_environment_variables_of_ours_are_settings(case: str):
    known = {f"LORAPLEX_{name.upper()}" for name in (*RouterSettings.model_fields, *NodeSettings.model_fields)}
    for pod in [*pods(rendered(case), "router"), *pods(rendered(case), "shard")]:
        for container in pod["spec"]["containers"]:
            names = {variable["name"] for variable in container.get("env", [])}
            assert {name for name in names if name.startswith("LORAPLEX_")} <= known


@every_case
def test_each_router_gets_the_addresses_of_its_own_replicas(case: str):
    objects = rendered(case)
    selectors = [(service, service["spec"]["selector"]) for service in of_kind(objects, "Service")]
    own = {selector["loraplex/router"]: service for service, selector in selectors if "loraplex/router" in selector}
    for pod in pods(objects, "router") if own else ():
        service = own[pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"]]
        port = service["spec"]["ports"][0]["port"]
        expected = f"dns:///{service['metadata']['name']}.{NAMESPACE}.svc:{port}"
        assert f"--shards={expected}" in pod["spec"]["containers"][0]["args"]


def test_replicas_that_span_nodes_are_found_by_their_pods_names():
    router, other = pods(rendered("replicas that span nodes"), "router")
    domain = "demo-loraplex-shard-0.serving.svc"
    replicas = [
        ",".join(
            f"demo-loraplex-shard-0-{pod}.{domain}:{50060 + rank}" for pod in (f"{n}", f"{n}-1") for rank in (0, 1)
        )
        for n in (0, 1)
    ]
    assert f"--shards={';'.join(replicas)}" in router["spec"]["containers"][0]["args"]
    assert not any(domain in flag for flag in other["spec"]["containers"][0]["args"])
    (workload, _) = of_kind(rendered("replicas that span nodes"), "LeaderWorkerSet")
    assert workload["spec"]["leaderWorkerTemplate"]["size"] == 2


@every_case
def test_a_rank_that_hangs_is_restarted_and_takes_the_others_with_it(case: str):
    for document in of_kind(rendered(case), "LeaderWorkerSet"):
        assert document["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    for pod in pods(rendered(case), "shard"):
        (container,) = pod["spec"]["containers"]
        ports = [port["containerPort"] for port in container["ports"]]
        assert probed_port(container["startupProbe"]) == ports[0] == 50060
        # The port of a process that hangs is still open.
        assert "tcpSocket" not in container["livenessProbe"] and probed_port(container["livenessProbe"]) in ports


def probed_port(probe: Object) -> int:
    return (probe.get("grpc") or probe.get("httpGet") or probe["tcpSocket"])["port"]


@every_case
def test_probes_call_services_that_exist(case: str):
    served = {
        "router": f"loraplex.v1.{generation_pb2.DESCRIPTOR.services_by_name['GenerationService'].name}",
        "shard": shard_pb2.DESCRIPTOR.services_by_name["ShardService"].full_name,
    }
    for component, service in served.items():
        for pod in pods(rendered(case), component):
            for container in pod["spec"]["containers"]:
                probe = container["readinessProbe"]
                if component == "shard" and case == "mutual TLS":
                    assert "tcpSocket" in probe  # the kubelet's gRPC probes do not support TLS
                else:
                    assert probe["grpc"]["service"] == service


def test_with_mutual_tls_both_sides_have_their_own_certificate(mounts: Path):
    for component, secret in (("router", "router-cert"), ("shard", "shard-cert")):
        (pod,) = pods(rendered("mutual TLS"), component)
        (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "mtls")
        assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440}
        settings = router_settings(pod, mounts) if component == "router" else shard_settings(pod, mounts)[1]
        assert settings.mtls_ca == mounts / "etc/loraplex/mtls/ca.crt"


def test_shards_get_the_urls_of_object_stores(mounts: Path):
    (pod,) = pods(rendered("adapters in object stores"), "shard")
    (settings,) = shard_settings(pod, mounts)
    assert settings.adapters_s3 == "s3://bucket/adapters"
    assert settings.adapters_gcs == "gs://bucket/adapters"
    assert settings.adapters_azure == "az://container"
    variables = {variable["name"]: variable for variable in pod["spec"]["containers"][0]["env"]}
    assert variables["AWS_ENDPOINT_URL_S3"]["value"] == "https://s3.example"
    assert variables["AZURE_STORAGE_ACCOUNT_NAME"]["value"] == "account"
    for secret, name in (
        ("aws", "AWS_ACCESS_KEY_ID"),
        ("aws", "AWS_SECRET_ACCESS_KEY"),
        ("google", "GOOGLE_SERVICE_ACCOUNT_KEY"),
        ("azure", "AZURE_STORAGE_ACCOUNT_KEY"),
    ):
        assert variables[name]["valueFrom"]["secretKeyRef"] == {"name": secret, "key": name}


def test_routers_get_the_bucket_of_batches_with_its_credentials(mounts: Path):
    for case, url, names in (
        ("batches in S3", "s3://bucket/batches", {"AWS_ACCESS_KEY_ID": "batches", "AWS_SECRET_ACCESS_KEY": "batches"}),
        ("batches in Google Cloud Storage", "gs://bucket", {"GOOGLE_SERVICE_ACCOUNT_KEY": "google"}),
        ("batches in Azure", "az://c-1/a/b", {"AZURE_STORAGE_ACCOUNT_KEY": "azure"}),
    ):
        for pod in pods(rendered(case), "router"):
            assert router_settings(pod, mounts).batches == url
            variables = {variable["name"]: variable for variable in pod["spec"]["containers"][0]["env"]}
            for name, secret in names.items():
                assert variables[name]["valueFrom"]["secretKeyRef"] == {"name": secret, "key": name}
        for pod in pods(rendered(case), "shard"):
            assert not {*names, "AWS_ENDPOINT_URL_S3"} & {each["name"] for each in pod["spec"]["containers"][0]["env"]}
    pod, *_ = pods(rendered("batches in S3"), "router")
    variables = {variable["name"]: variable.get("value") for variable in pod["spec"]["containers"][0]["env"]}
    assert (variables["AWS_ENDPOINT_URL_S3"], variables["AWS_REGION"]) == ("https://minio.example", "eu-central-1")


def test_routers_in_a_pool_export_what_its_picker_reads(mounts: Path):
    (pooled,) = pods(rendered("all optional objects"), "router")
    (alone,) = pods(rendered("defaults"), "router")
    assert router_settings(pooled, mounts).gateway_metrics and not router_settings(alone, mounts).gateway_metrics


@pytest.mark.parametrize("drain", [0, 0.5, 30, 600])
def test_pods_have_more_time_to_stop_than_they_need(drain: float, mounts: Path):
    settings = {"drain-seconds": drain}
    objects = render({"router": {"settings": settings, "preStopSeconds": 20}, "shard": {"settings": settings}})
    (router,) = pods(objects, "router")
    assert router_settings(router, mounts).drain_seconds == drain
    assert router["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert router["spec"]["terminationGracePeriodSeconds"] >= drain + 20 + 5
    (shard,) = pods(objects, "shard")
    assert [settings.drain_seconds for settings in shard_settings(shard, mounts)] == [drain]
    assert shard["spec"]["terminationGracePeriodSeconds"] >= drain + 5


def test_loading_may_take_startup_seconds():
    (shard,) = pods(render({"shard": {"startupSeconds": 3601}}), "shard")
    probe = shard["spec"]["containers"][0]["startupProbe"]
    assert 3601 <= probe["periodSeconds"] * probe["failureThreshold"] <= 3601 + 5


def test_ranks_divide_the_cpu_limit_among_them_as_threads_unless_threads_is_set():
    def threads(cpu: object, **values: Object) -> list[str]:
        limits = {} if cpu is None else {"cpu": cpu}
        (shard,) = pods(render({"shard": {"resources": {"limits": limits}, **values}}), "shard")
        return [v["value"] for v in shard["spec"]["containers"][0]["env"] if v["name"] == "LORAPLEX_THREADS"]

    assert threads(None) == []
    assert threads(2, settings={"threads": 1}) == []
    assert [threads(cpu) for cpu in (2, "2", "2500m", "500m", 1.5)] == [["2"], ["2"], ["2"], ["1"], ["1"]]
    assert threads(8, settings={"tp": 3}) == ["2"]
    assert threads(8, settings={"tp": 4}, workload="LeaderWorkerSet", nodes=2) == ["4"]


@every_case
def test_helm_test_runs_a_command_that_the_client_has(case: str):
    (pod,) = pods(rendered(case), "test")
    (container,) = pod["spec"]["containers"]
    command, *arguments = container["args"]
    subcommand = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    parameters = subcommand.make_context(command, arguments).params
    services = of_kind(rendered(case), "Service")
    ports = {service["metadata"]["name"]: service["spec"]["ports"] for service in services}
    host, port = parameters["server"].split(":")
    assert {"name": "grpc", "port": int(port), "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"} in ports[host]
    assert parameters["prompt"] and parameters["raw"]


def test_the_notes_show_how_to_reach_the_service():
    text = notes({"router": {"service": {"grpcPort": 443}}})
    assert f"kubectl --namespace {NAMESPACE} port-forward service/demo-loraplex 50051:443 3000:3000" in text
    assert text.count("kubectl") == 2 and 'loraplex generate "' in text


@pytest.mark.parametrize(
    ("values", "replicas"),
    [
        ({}, "3"),
        ({"autoscaling": {"enabled": True}}, "1 to 4"),
        ({"keda": {"enabled": True, "maxReplicas": 9}}, "1 to 9"),
    ],
)
def test_the_notes_say_how_many_replicas_each_router_has(values: Object, replicas: str):
    keda = {"serverAddress": "http://prometheus", **values.get("keda", {})}
    text = notes({**values, "keda": keda, "router": {"replicas": 2}, "shard": {"replicas": 3, "settings": {"tp": 4}}})
    assert f"Routers: 2. Replicas per router: {replicas}. Ranks per replica: 4.\nThe 4 ranks of a pod share" in text


def test_the_notes_say_what_the_ranks_of_a_pod_share():
    resources = {"requests": {"cpu": "8", "memory": "20Gi"}, "limits": {"memory": "40Gi"}}
    spanning = {"workload": "LeaderWorkerSet", "nodes": 2, "resources": resources, "settings": {"tp": 4}}
    (line,) = [line for line in notes({"shard": spanning}).splitlines() if "ranks of a pod" in line]
    said, _, given = line.partition(": ")
    assert said == "The 2 ranks of a pod share what shard.resources give to it" and json.loads(given) == resources
    assert "ranks of a pod" not in notes({})
