"""Variables of the environment that are not settings of the command that reads them: LORAPLEX_*, and those of other
servers."""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from loraplex.cli.habits import FORMER, HABITS, LLAMA_CPP, SERIOUS, VARIABLES, setting_of

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


def is_setting(name: str) -> bool:
    """Whether it sets something here or in another server."""
    return name.startswith((PREFIX, LLAMA_CPP)) or name in VARIABLES


def foreign(own: Collection[str], given: Collection[str], environment: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """What to say about each variable that other servers read, and whether the command should not start because of it.
    `given`: the command's `own` settings that are set by their own names."""
    for name, value in sorted(environment.items()):
        flag = VARIABLES.get(name) or f"--{name.removeprefix(LLAMA_CPP).lower().replace('_', '-')}"
        known = HABITS.get(flag, flag)
        setting = setting_of(known)
        if value.lower() in ("", "0", "false") or is_service_link(name, value) or setting in given:
            continue
        if is_setting(name) and not name.startswith(PREFIX):
            if setting in own:
                ours = re.sub("--([a-z-]+)", lambda found: variable(found[1].replace("-", "_")), known)
                ours = re.sub(r"(LORAPLEX_\w+) (FILE|DIRECTORY)", r"\1=\2", ours)
                yield f"{name} has no effect; here it is {ours}", name in SERIOUS
            elif not known.startswith("--") and known.removeprefix("the variable ") not in environment:
                yield f"{name} has no effect; here it is {known}", False


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
