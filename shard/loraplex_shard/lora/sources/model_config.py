"""Reads what a config.json beside an adapter says about a classifier. Trainers may leave the model's config.json
there."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MODEL_CONFIG = "config.json"
MAX_MODEL_CONFIG = 2**22  # bytes
MAX_LABEL = 512  # characters


@dataclass(frozen=True, slots=True)
class ModelConfig:
    labels: tuple[str, ...] = ()  # in the order of the classifier's outputs; empty: unknown
    problem_type: str = ""  # transformers' name for it; empty: unknown
    pad_token_id: int | None = None

    @property
    def content(self) -> bytes:
        """Bytes that are the same for the same values; empty if there are none."""
        return json.dumps(asdict(self), sort_keys=True).encode() if self != ModelConfig() else b""


def read_model_config(data: bytes) -> ModelConfig:
    """Reads the file. Missing and malformed values are ignored, since the file is not the adapter's own."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return ModelConfig()
    if not isinstance(content, dict):
        return ModelConfig()
    problem_type, pad = content.get("problem_type"), content.get("pad_token_id")
    return ModelConfig(
        labels=read_labels(content),
        problem_type=problem_type[:MAX_LABEL] if isinstance(problem_type, str) else "",
        pad_token_id=pad if isinstance(pad, int) and not isinstance(pad, bool) else None,
    )


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of id2label in the order of their numbers, if it names all of them."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not all(isinstance(label, str) for label in named.values()):
        return ()
    by_number = {str(number): label[:MAX_LABEL] for number, label in named.items()}
    numbers = [str(number) for number in range(len(by_number))]
    return tuple(by_number[number] for number in numbers) if by_number.keys() == set(numbers) else ()
