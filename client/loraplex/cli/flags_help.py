"""The help of a command whose flags come from a settings class: grouped by subject, with full names, wrapped to any
width."""

import fnmatch
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

WIDEST = 100  # longer lines are hard to read
SUBJECTS = {  # with shell patterns
    "Model": (
        *("model", "revision", "served_model_name", "generation_config", "reasoning_parser"),
        *("device", "dtype", "quantize", "tp", "rank", "nodes", "node_rank", "rendezvous"),
    ),
    "Adapters": ("adapters*", "adapter_*", "max_adapters_on_device"),
    "Capacity": (
        *("max_model_len", "max_sequences", "max_batch_tokens", "max_queue", "kv_blocks", "kv_dtype"),
        "gpu_memory_fraction",
        *("prefix_cache", "max_body_mib", "stored_responses_mib"),
        *("threads", "kernels", "move_seconds", "drain_seconds"),
    ),
    "Network": ("host", "http_port", "grpc_port", "listen", "shards"),
    "Security": ("api_keys", "metrics_auth", "cors_origins", "tls_cert", "tls_key", "mtls_cert", "mtls_key", "mtls_ca"),
    "Telemetry": (
        *("log_format", "log_prompts", "metrics_port", "metrics_adapters", "lorax_metrics", "gateway_metrics"),
        *("usage_log", "otlp_endpoint", "trace_sampling"),
    ),
    "Batches and resuming": ("batches", "batches_gib", "store", "resume_seconds"),
}
OTHERS = "Other"
EXAMPLE = "LORAPLEX_DRAIN_SECONDS for --drain-seconds"  # a setting of each command


def describe(kind: type[BaseModel], command: str, text: str, positional: str, columns: int) -> str:
    """The complete help. `positional` names the field that is given without a flag."""
    columns = min(columns, WIDEST)
    argument = f" [{positional.upper()}]" if positional else ""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    lines = [f"Usage: loraplex {command}{argument} [OPTIONS]"]
    for paragraph in (*paragraphs, f"Each setting is also an environment variable: {EXAMPLE}."):
        lines += ["", *textwrap.wrap(paragraph, columns, break_long_words=False)]
    for subject, names in _by_subject(kind):
        lines += ["", f"{subject}:"]
        for name in names:
            lines += _setting(name, kind.model_fields[name], name == positional, columns)
    return "\n".join(lines)


def _by_subject(kind: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    left = list(kind.model_fields)
    for subject, patterns in {**SUBJECTS, OTHERS: ("*",)}.items():
        if found := [name for pattern in patterns for name in fnmatch.filter(left, pattern)]:
            yield subject, found
            left = [name for name in left if name not in found]


def _setting(name: str, field: FieldInfo, positional: bool, columns: int) -> list[str]:
    flag = name.upper() if positional else f"--{name.replace('_', '-')}"
    value = "" if positional else _value(field.annotation)
    default = f"  (default: {field.default})" if _is_worth_a_word(field) else ""
    required = "  (required)" if field.is_required() else ""
    text = textwrap.wrap(
        field.description or "",
        columns,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [f"  {flag}{value and ' '}{value}{default}{required}", *text]


def _value(annotation: Any) -> str:
    """A flag's value in the help; empty for a switch."""
    if get_origin(annotation) is UnionType:
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return {bool: "", int: "N", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _is_worth_a_word(field: FieldInfo) -> bool:
    return not field.is_required() and field.default not in (None, "", False, ())
