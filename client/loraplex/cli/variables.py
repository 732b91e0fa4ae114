"""LORAPLEX_* variables of the environment that are not settings of the command that reads them."""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from loraplex.cli.habits import FORMER, HABITS

PREFIX = "LORAPLEX_"
NOT_FOR_SERVICES = re.compile(PREFIX + "(SERVER|URL|TEST_.*)")  # for the client's commands and for tests
# Kubernetes sets such variables in each pod, for each Service whose name begins with "loraplex".
SERVICE_LINK = re.compile(r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
SERVICE_URL = re.compile(r"(tcp|udp|sctp)://\S+")  # of a variable that ends with _PORT


def variable(setting: str) -> str:
    return PREFIX + setting.upper()


def is_service_link(name: str, value: str) -> bool:
    return bool(SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and SERVICE_URL.fullmatch(value)))


def former(own: Collection[str], environment: Mapping[str, str]) -> str | None:
    """What to say about a variable that sets one of the command's `own` settings by the name of an earlier version;
    None if there is none."""
    for setting, name in FORMER.items():
        if environment.get(variable(setting)) and name in own:
            return f"{variable(setting)} is now {variable(name)}"
    return None


def without_effect(
    command: str, own: Collection[str], others: Mapping[str, Collection[str]], environment: Mapping[str, str]
) -> Iterator[str]:
    """What to say about each variable that `command` does not read. `own` and `others` are settings, those of others by
    the command."""
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or not value or NOT_FOR_SERVICES.fullmatch(name):
            continue
        setting = name.removeprefix(PREFIX).lower()
        if is_service_link(name, value):
            if setting in own:
                service = name.removesuffix("_PORT").replace("_", "-").lower()
                yield (
                    f"{name} has no effect: Kubernetes has set it to {value} for a Service named {service}; "
                    "`enableServiceLinks: false` in the pod's spec prevents that"
                )
        elif setting not in own:
            yield _explained(name, setting, command, own, others)


def _explained(
    name: str, setting: str, command: str, own: Collection[str], others: Mapping[str, Collection[str]]
) -> str:
    if theirs := [other for other, settings in others.items() if setting in settings]:
        return f"{name} has no effect on `loraplex {command}`: it is a setting of `loraplex {theirs[0]}`"
    unknown = f"{name} is not a setting of `loraplex {command}`"
    if habit := HABITS.get(f"--{setting.replace('_', '-')}"):
        return f"{unknown}; as a flag, it is {habit}"
    if near := get_close_matches(setting, own, 1, 0.75):
        return f"{unknown}: did you mean {variable(near[0])}?"
    return unknown
