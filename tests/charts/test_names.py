"""Names, namespaces, labels and annotations of objects, whatever the release is called."""

import re

import pytest

from tests.charts.rendering import CASES, NAMESPACE, of_kind, pods, render, rendered

every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_names_of_objects_are_distinct_and_not_too_long(case: str):
    names = [(document["kind"], document["metadata"]["name"]) for document in rendered(case)]
    assert len(names) == len(set(names))
    for _, name in names:
        assert len(name) <= 52  # 63 characters for the labels that controllers build from it, less their suffixes


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("demo", "demo-loraplex"),
        ("my-loraplex", "my-loraplex"),
        ("7b-chat", "loraplex-7b-chat"),
        ("7b-loraplex", "loraplex-7b-loraplex"),
        ("llama-3.1-8b", "llama-3-1-8b-loraplex"),
        ("123", "loraplex-123"),
        ("r" * 53, f"{'r' * 31}-[0-9a-f]{{8}}"),
        ("r" * 52, f"{'r' * 31}-[0-9a-f]{{8}}"),
        (f"{'9' * 30}.{'a' * 22}", "loraplex-9{22}-[0-9a-f]{8}"),
    ],
)
def test_objects_have_valid_service_names_whatever_the_release_is_called(release: str, name: str):
    values = {**CASES["all optional objects"].values, "fullnameOverride": "", "router": {"replicas": 12}}
    objects = render(values, release)
    names = [document["metadata"]["name"] for document in objects if document["metadata"]["name"] != "runner"]
    made = [other for other in names if not other.startswith(f"{release}-more") and other != f"{release}-secret"]
    base = next(other for other in made if re.fullmatch(name, other))
    assert all(other.startswith(base) and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", other) for other in made)
    assert max(map(len, made)) <= 52
    labels = {document["metadata"].get("labels", {}).get("app.kubernetes.io/instance") for document in objects}
    assert labels <= {release, None}
    services = {service["metadata"]["name"] for service in of_kind(objects, "Service")}
    for number, pod in enumerate(pods(objects, "router")):
        assert f"--shards=dns:///{base}-shard-{number}.{NAMESPACE}.svc:50060" in pod["spec"]["containers"][0]["args"]
        assert f"{base}-shard-{number}" in services


def test_two_long_release_names_do_not_collide():
    first, second = ({d["metadata"]["name"] for d in render({}, f"{'r' * 50}{end}")} for end in ("a", "b"))
    assert not first & second


@every_case
def test_every_object_has_the_releases_namespace_and_the_common_labels_and_annotations(case: str):
    values = {**CASES[case].values, "commonLabels": {"team": "a"}, "commonAnnotations": {"b": "c"}, "extraObjects": []}
    for document in render(values):
        metadata = document["metadata"]
        assert metadata["namespace"] == NAMESPACE
        assert metadata["labels"]["team"] == "a" and metadata["annotations"]["b"] == "c"


@every_case
def test_rendering_is_deterministic(case: str):
    assert render(CASES[case].values) == list(rendered(case))
