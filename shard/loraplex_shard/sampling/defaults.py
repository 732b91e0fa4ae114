"""A model's own defaults for sampling parameters: those that vLLM takes from generation_config.json, by their names
there."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

# The bounds of each parameter: it must be above the first number, and at most the second.
LARGEST = 3.0e38
RANGES = {
    "temperature": (-1e-9, LARGEST),
    "top_k": (0, 2**32 - 1),
    "top_p": (0, 1),
    "min_p": (-1e-9, 1),
    "repetition_penalty": (0, LARGEST),
}


def sampling_defaults(named: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The values of `named` that are within their bounds. Others are left out with a warning that names the file, since
    a request would be refused for a value that it did not send. A top_k of 0 means none and gives no warning."""
    given = {name: named[name] for name in RANGES if named.get(name) is not None}
    if given.get("top_k") == 0:
        del given["top_k"]
    usable = {name: value for name, value in given.items() if _is_usable(value, *RANGES[name])}
    for name in given.keys() - usable.keys():
        logger.warning("%s: %s %r is left out: it is not within its bounds", file, name, given[name])
    return {name: int(value) if name == "top_k" else float(value) for name, value in usable.items()}


def _is_usable(value: object, above: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value <= most
