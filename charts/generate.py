"""Writes the chart's README.md and values.schema.json from values.yaml and the settings classes.

    python -m charts.generate

`router.settings` and `shard.settings` take the flags of the two commands, except those that the chart passes itself.
Their names, limits and descriptions come from the settings classes, so running this adds new settings to the chart.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from pydantic import BaseModel

from charts.values_file import Schema, Value, read_values
from loraplex_router.settings import RouterSettings
from loraplex_shard.settings import NodeSettings

CHART = Path(__file__).parent / "loraplex"
FORMER: dict[str, str] = yaml.safe_load((CHART / "former-values.yaml").read_text())
SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
SETTINGS: dict[str, type[BaseModel]] = {"router": RouterSettings, "shard": NodeSettings}
MTLS = {"mtls_cert", "mtls_key", "mtls_ca"}
STORES = {"adapters_s3", "adapters_gcs", "adapters_azure"}
# What the chart passes itself.
PASSED = {
    "router": {"host", "http_port", "grpc_port", "shards", "api_keys", "adapter_registry", *MTLS},
    "shard": {"rank", "nodes", "node_rank", "listen", "rendezvous", "adapters", *STORES, "metrics_port", *MTLS},
}
KEPT = {"type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern", "anyOf"}


def schema(values: list[Value]) -> str:
    """values.schema.json: unknown keys are refused everywhere except in Kubernetes' own objects. Those of earlier
    versions are refused by a template, which says what to do instead."""
    properties: Schema = {value.name: _resolve(value.schema()) for value in values}
    properties["global"] = {"type": "object"}  # Helm's own
    for path in FORMER:
        *sections, name = path.split(".")
        section = properties
        for each in sections:
            section = section[each]["properties"]
        section[name] = {}
    whole = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return json.dumps(whole, indent=1) + "\n"


def readme(values: list[Value]) -> str:
    """README.md: every value with its default and description."""
    lines = [
        "# The loraplex chart",
        "",
        "Installs routers and the shards that they drive. [Kubernetes](../../docs/kubernetes.md) shows how to use it.",
        "`python -m charts.generate` generates this page from `values.yaml` and the commands' settings.",
        "",
        "A replica serves one router. Each of `router.replicas` routers has `shard.replicas` replicas and, if enabled,",
        "an autoscaler that changes their number. There is one Service and there are two PodDisruptionBudgets, one of",
        "routers and one of shards, for all routers together.",
        "",
        "## Values",
        "",
    ]
    plain = [value for value in values if not value.children]
    lines += _table(("value", "default", ""), [_row(value, "") for value in plain])
    for value in values:
        if value.children:
            lines += ["", f"### {value.name}", "", value.text, ""]
            lines += _table(("value", "default", ""), list(_rows(value, "")))
    for component in SETTINGS:
        lines += ["", f"### {component}.settings", "", f"Flags of `loraplex {component}`, without the dashes.", ""]
        lines += _table(("setting", "default", ""), list(_setting_rows(component)))
    return "\n".join(lines) + "\n"


def setting_properties(component: str) -> Iterator[tuple[str, Schema]]:
    """The flags that `component.settings` takes, without dashes, and their JSON schemas with default and
    description."""
    properties = SETTINGS[component].model_json_schema()["properties"]
    for name, described in properties.items():
        if name not in PASSED[component]:
            yield name.replace("_", "-"), described


def fields_of(kind: str) -> list[str]:
    """The fields of a Kubernetes object's part, such as podspec-v1, in the newest known Kubernetes version."""
    newest = max(
        SCHEMAS.glob("*-local"), key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)]
    )
    return sorted(json.loads((newest / f"{kind}.json").read_text())["properties"])


def _resolve(node: Any) -> Any:
    """Replaces `settingsOf` and `fieldsOf` by the settings' schemas and the field names of Kubernetes' objects."""
    if not isinstance(node, dict):
        return node
    if kind := node.get("fieldsOf"):
        return {"type": "object", "additionalProperties": False, "properties": {name: {} for name in fields_of(kind)}}
    if component := node.get("settingsOf"):
        properties = {name: _kept(described) for name, described in setting_properties(component)}
        return {"type": "object", "additionalProperties": False, "properties": properties}
    return {key: _resolve(value) for key, value in node.items()}


def _kept(described: Schema) -> Schema:
    return {key: value for key, value in described.items() if key in KEPT}


def _rows(section: Value, prefix: str) -> Iterator[tuple[str, str, str]]:
    for value in section.children:
        path = f"{prefix}{section.name}."
        if value.children:
            yield f"**{path}{value.name}**", "", value.text
            yield from _rows(value, path)
        else:
            yield _row(value, path)


def _row(value: Value, prefix: str) -> tuple[str, str, str]:
    default = (
        yaml.safe_dump(value.default, default_flow_style=True, sort_keys=False, width=10_000)
        .removesuffix("...\n")
        .strip()
    )
    return f"`{prefix}{value.name}`", f"`{default}`", value.text


def _setting_rows(component: str) -> Iterator[tuple[str, str, str]]:
    for name, described in setting_properties(component):
        default = described.get("default")
        yield f"`{name}`", "" if default is None else f"`{json.dumps(default)}`", described["description"]


def _table(headings: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> list[str]:
    escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in [headings, ("---", "---", "---"), *escaped]]


def main() -> None:
    values = read_values(CHART / "values.yaml")
    (CHART / "values.schema.json").write_text(schema(values))
    (CHART / "README.md").write_text(readme(values))


if __name__ == "__main__":
    main()
