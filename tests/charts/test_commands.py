"""What the chart starts is what the commands take, and the times that it gives them suffice."""

from pathlib import Path

import pytest
import typer

from loraplex.cli.flags import parse
from loraplex.cli.main import app
from loraplex_protos import generation_pb2, shard_pb2
from loraplex_router.settings import RouterSettings
from loraplex_shard.settings import ShardSettings
from tests.charts.rendering import CASES, NAMESPACE, Object, notes, of_kind, pods, render, rendered

every_case = pytest.mark.parametrize("case", CASES)


def router_settings(pod: Object) -> RouterSettings:
    (container,) = pod["spec"]["containers"]
    command, *flags = container["args"]
    assert command == "router"
    return parse(RouterSettings, flags, command, "")


def shard_settings(pod: Object, adapters: Path) -> list[ShardSettings]:
    """Of all ranks in the pod; for a LeaderWorkerSet, of the leader."""
    found = []
    for container in pod["spec"]["containers"]:
        command, *flags = container["args"]
        assert command == "shard"
        for before, after in (("$(RANK)", "0"), ("$(LWS_LEADER_ADDRESS)", "leader"), ("=/adapters", f"={adapters}")):
            flags = [flag.replace(before, after) for flag in flags]
        found.append(parse(ShardSettings, flags, command, ""))
    return found


@every_case
def test_routers_are_given_settings_that_they_take(case: str):
    for pod in pods(rendered(case), "router"):
        settings = router_settings(pod)
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert (settings.host, settings.http_port, settings.grpc_port) == ("0.0.0.0", ports["http"], ports["grpc"])


@every_case
def test_ranks_are_given_settings_that_they_take(case: str, tmp_path: Path):
    for pod in pods(rendered(case), "shard"):
        settings = shard_settings(pod, tmp_path)
        assert [one.rank for one in settings] == list(range(len(settings)))
        for one, container in zip(settings, pod["spec"]["containers"], strict=True):
            grpc, metrics = (port["containerPort"] for port in container["ports"])
            assert (one.listen, one.metrics_port) == (f"0.0.0.0:{grpc}", metrics)
        if len(settings) > 1:
            assert len(settings) == settings[0].tp and len({one.rendezvous for one in settings}) == 1


def test_values_arrive_as_they_were_given(tmp_path: Path):
    case = "secrets and claims of the user's"
    (settings,) = shard_settings(next(pods(rendered(case), "shard")), tmp_path)
    assert (settings.model, settings.revision, settings.adapters) == ("org/name", "main", tmp_path)
    assert (settings.max_model_len, settings.kv_blocks) == (1_000_000, 2_000_000)
    assert router_settings(next(pods(rendered(case), "router"))).api_keys == Path("/etc/loraplex/api-keys/keys.yaml")
    changed = render({"router": {"settings": {"drain-seconds": 0.5, "max-queue": 12345678, "log-prompts": True}}})
    router = router_settings(next(pods(changed, "router")))
    assert (router.drain_seconds, router.max_queue, router.log_prompts) == (0.5, 12345678, True)


@every_case
def test_variables_of_ours_are_settings(case: str):
    known = {f"LORAPLEX_{name.upper()}" for name in (*RouterSettings.model_fields, *ShardSettings.model_fields)}
    for pod in [*pods(rendered(case), "router"), *pods(rendered(case), "shard")]:
        for container in pod["spec"]["containers"]:
            names = {variable["name"] for variable in container.get("env", [])}
            assert {name for name in names if name.startswith("LORAPLEX_")} <= known


@every_case
def test_each_router_is_told_where_its_own_groups_are(case: str):
    objects = rendered(case)
    headless = [d for d in of_kind(objects, "Service") if d["spec"].get("clusterIP") == "None"]
    own = {service["spec"]["selector"]["loraplex/router"]: service for service in headless}
    for pod in pods(objects, "router") if headless else ():
        service = own[pod["metadata"]["labels"]["loraplex/router"]]
        port = service["spec"]["ports"][0]["port"]
        expected = f"dns:///{service['metadata']['name']}.{NAMESPACE}.svc:{port}"
        assert f"--shards={expected}" in pod["spec"]["containers"][0]["args"]


def test_groups_that_span_nodes_are_found_by_their_pods_names():
    router, other = pods(rendered("groups that span nodes"), "router")
    domain = "demo-loraplex-shard-0.serving.svc:50060"
    groups = [",".join(f"demo-loraplex-shard-0-{pod}.{domain}" for pod in (f"{n}", f"{n}-1")) for n in (0, 1)]
    assert f"--shards={';'.join(groups)}" in router["spec"]["containers"][0]["args"]
    assert not any(domain in flag for flag in other["spec"]["containers"][0]["args"])


@every_case
def test_ranks_that_can_only_begin_together_are_restarted_together(case: str):
    for document in of_kind(rendered(case), "LeaderWorkerSet"):
        assert document["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    for pod in pods(rendered(case), "shard"):
        containers = pod["spec"]["containers"]
        own = [container["startupProbe"]["grpc"]["port"] for container in containers]
        watched = [container["livenessProbe"]["grpc"]["port"] for container in containers]
        assert own == [container["ports"][0]["containerPort"] for container in containers]
        assert watched == own[1:] + own[:1]


@every_case
def test_probes_ask_for_services_that_exist(case: str):
    served = {
        "router": f"loraplex.v1.{generation_pb2.DESCRIPTOR.services_by_name['GenerationService'].name}",
        "shard": shard_pb2.DESCRIPTOR.services_by_name["ShardService"].full_name,
    }
    for component, service in served.items():
        for pod in pods(rendered(case), component):
            for container in pod["spec"]["containers"]:
                assert container["readinessProbe"]["grpc"]["service"] == service


@pytest.mark.parametrize("drain", [0, 0.5, 30, 600])
def test_pods_are_given_more_time_to_end_than_they_take(drain: float):
    objects = render({"router": {"settings": {"drain-seconds": drain}, "preStopSeconds": 20}})
    (router,) = pods(objects, "router")
    assert router_settings(router).drain_seconds == drain
    assert router["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert router["spec"]["terminationGracePeriodSeconds"] >= drain + 20 + 5


def test_loading_may_take_as_long_as_is_said():
    (shard,) = pods(render({"shard": {"startupSeconds": 3601}}), "shard")
    probe = shard["spec"]["containers"][0]["startupProbe"]
    assert 3601 <= probe["periodSeconds"] * probe["failureThreshold"] <= 3601 + 5


def test_a_limit_of_cpus_is_the_number_of_threads_unless_that_is_set():
    def threads(values: Object) -> list[Object]:
        (shard,) = pods(render({"shard": values}), "shard")
        return [v for v in shard["spec"]["containers"][0]["env"] if v["name"] == "LORAPLEX_THREADS"]

    limited = {"resources": {"limits": {"cpu": 2}}}
    assert threads({}) == []
    assert threads(limited)[0]["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert threads({**limited, "settings": {"threads": 1}}) == []


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


def test_the_notes_lead_to_the_service():
    text = notes({"router": {"service": {"grpcPort": 443}}})
    assert f"kubectl --namespace {NAMESPACE} port-forward service/demo-loraplex 50051:443 3000:3000" in text
    assert text.count("kubectl") == 2 and 'loraplex generate "' in text
