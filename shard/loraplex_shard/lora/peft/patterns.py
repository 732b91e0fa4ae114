"""Matches an adapter's regular expressions against module names, in a separate process.

An adapter's author chooses the expressions, and some expressions take years to match. Python's matcher holds the
interpreter's lock meanwhile, which would stop every sequence on this shard. In another process, it is stopped after its
time limit.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from loraplex_protos.errors import AdapterInvalidError

_TIME_LIMIT_S = 10.0

# Reads [limit, patterns, names]. Writes for each pattern the indices of the names that it matches in full, or its
# error. Ends by itself after `limit` seconds of a processor: nobody may be left to end it.
_MATCHER = """
import json, re, resource, sys
limit, patterns, names = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
def matches(pattern):
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return [index for index, name in enumerate(names) if compiled.fullmatch(name)]
json.dump([matches(pattern) for pattern in patterns], sys.stdout)
"""


def matching_names(field: str, patterns: Sequence[str], names: Sequence[str]) -> list[frozenset[str]]:
    """Returns the names that each regular expression matches in full.

    Raises AdapterInvalidError, naming the config's `field`, if an expression is malformed or takes too long.
    """
    if not patterns:
        return []
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([int(_TIME_LIMIT_S) + 1, list(patterns), list(names)]),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            timeout=_TIME_LIMIT_S,
            check=True,
        ).stdout
    except subprocess.TimeoutExpired:
        raise AdapterInvalidError(
            f"adapter_config.json: {field} takes more than {_TIME_LIMIT_S:.0f} s to match: name the modules instead"
        ) from None
    except subprocess.CalledProcessError:
        raise AdapterInvalidError(f"adapter_config.json: {field} cannot be matched: name the modules instead") from None
    matched: list[frozenset[str]] = []
    for pattern, result in zip(patterns, json.loads(answer), strict=True):
        if isinstance(result, str):
            raise AdapterInvalidError(
                f"adapter_config.json: {field}: {pattern[:100]!r} is not a regular expression: {result}"
            )
        matched.append(frozenset(names[index] for index in result))
    return matched
