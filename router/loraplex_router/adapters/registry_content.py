"""What the file of --adapter-registry says, in YAML or JSON: reads it, checks it, and writes it.

adapters:
  sql:
    1: {id: acme/sql-lora, source: hub, revision: 5f3c2d1}
    2: {id: acme/sql-lora, source: hub, revision: 9ab07e4}
aliases:
  sql-stable: sql@1
  sql-canary: {sql@1: 95, sql@2: 5}  # per cent
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from math import isclose
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraplex_protos.adapter_names import RULE, is_id, is_name, normal, why_not
from loraplex_protos.errors import LoraplexError, quote
from loraplex_router.access.strict_yaml import describe, key_lines, read_yaml
from loraplex_router.adapters.registry import AT, Registered
from loraplex_router.vocabulary.references import UPLOADED, AdapterReference, Version

Number = Annotated[int, Field(ge=1, lt=2**63, strict=False)]  # of a version; JSON's keys are texts
Weight = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
UPLOAD = re.compile("[0-9a-f]{32}")  # an uploaded adapter's id
DIGEST = re.compile("([0-9a-f]{64})?")
PLAIN = re.compile("[A-Za-z][A-Za-z0-9_./-]*")  # what YAML reads as the text that it is, except WORDS
WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}


class ContentError(ValueError):
    """Content that no registry has. `field` is what of a change is wrong: "name" or "targets"."""

    def __init__(self, place: str, reason: str, field: str = "name") -> None:
        super().__init__(f"{place}: {reason}")
        self.field, self.reason = field, reason


class RegistryFileError(LoraplexError):
    """The registry file cannot be used. The message says where the fault is."""


class _Origin(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str  # in its source
    source: str = ""
    revision: str = ""
    digest: str = ""  # that its content must have


class _RegistryFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    adapters: dict[str, Annotated[dict[Number, _Origin], Field(min_length=1)]] = {}
    aliases: dict[str, str | Annotated[dict[str, Weight], Field(min_length=1)]] = {}


def read_registry(path: Path) -> Registered:
    """Raises RegistryFileError for a file that is wrong as a whole. A version that can never be served has a fault."""
    try:
        data = path.read_bytes()
        if not data.strip():  # it may be about to be written
            raise ValueError("it is empty: write `adapters: {}` if there are none")
        content = read_yaml(data)
        file = _RegistryFile.model_validate({} if content is None else content)
        registered = Registered(
            {name: dict(_versions(name, versions)) for name, versions in file.adapters.items()},
            {alias: {to: 100.0} if isinstance(to, str) else to for alias, to in file.aliases.items()},
        )
        check(registered)
    except OSError as error:
        raise RegistryFileError(f"--adapter-registry: {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise RegistryFileError(f"--adapter-registry: {path}: {describe(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise RegistryFileError(f"--adapter-registry: {path} is not YAML{place}: {problem or error}") from None
    except ValueError as error:
        raise RegistryFileError(f"--adapter-registry: {path}: {error}") from None
    return _with_lines(registered, data)


def faulty(content: Registered) -> list[Version]:
    return [version for versions in content.names.values() for version in versions.values() if version.fault]


def write_registry(content: Registered, as_json: bool = False) -> str:
    """The content as a file says it, in YAML or in JSON."""
    names = {
        name: {number: _write_origin(version) for number, version in versions.items()}
        for name, versions in content.names.items()
    }
    if as_json:
        written = {"adapters": names, "aliases": {alias: dict(targets) for alias, targets in content.aliases.items()}}
        return json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    lines = ["adapters:" if names else "adapters: {}"]
    for name, versions in names.items():
        lines.append(f"  {_scalar(name)}:")
        for number, origin in versions.items():
            fields = ", ".join(f"{field}: {_scalar(value)}" for field, value in origin.items())
            lines.append(f"    {number}: {{{fields}}}")
    lines.append("aliases:" if content.aliases else "aliases: {}")
    for alias, targets in content.aliases.items():
        shares = ", ".join(f"{_scalar(target)}: {percent!r}" for target, percent in targets.items())
        lines.append(f"  {_scalar(alias)}: {{{shares}}}")
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """A text in YAML."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    if text.isprintable():
        return json.dumps(text, ensure_ascii=False)
    quoted: str = yaml.safe_dump(text, default_style='"', width=sys.maxsize)
    return quoted.rstrip("\n")


def check(content: Registered) -> None:
    """Raises ContentError for content that would not be clear to a request."""
    for name in content.names:
        _check_name(f"adapters.{name}", name)
    for alias, targets in content.aliases.items():
        place = f"aliases.{alias}"
        _check_name(place, alias)
        if alias in content.names:
            raise ContentError(place, "is a name in `adapters`, too: give the alias another name")
        for target in targets:
            _check_target(place, target, content)
        if not all(0 < percent <= 100 for percent in targets.values()):
            raise ContentError(place, "every weight must be between 0 and 100", "targets")
        total = sum(targets.values())
        if not isclose(total, 100, abs_tol=1e-6):
            raise ContentError(place, f"the weights add up to {total:g}, not to 100", "targets")
    try:
        TopologicalSorter(content.aliases).prepare()
    except CycleError as error:
        raise ContentError(
            "aliases", f"they lead in a circle: {' -> '.join(reversed(error.args[1]))}", "targets"
        ) from None


def _check_name(place: str, name: str) -> None:
    if not is_name(name) or AT in name or name != normal(name):
        raise ContentError(place, f"is not a valid name: {RULE}; a registered one does not contain {AT}")


def _check_target(place: str, target: str, content: Registered) -> None:
    name, at, number = target.partition(AT)
    versions = content.names.get(name)
    if versions is None and (at or target not in content.aliases):
        raise ContentError(place, f"the registry has no {quote(name)}", "targets")
    if versions is not None and at and number not in map(str, versions):
        raise ContentError(place, f"{quote(name)} has no version {quote(number)}", "targets")


def _write_origin(version: Version) -> dict[str, str]:
    origin = version.origin
    fields = {"id": origin.id, "source": origin.source, "revision": origin.revision, "digest": version.digest}
    return {name: value for name, value in fields.items() if value}


def _versions(name: str, versions: Mapping[int, _Origin]) -> Iterator[tuple[int, Version]]:
    for number, origin in versions.items():
        reference = AdapterReference(origin.id, origin.source, origin.revision)
        yield number, Version(name, number, reference, origin.digest, _fault(origin))


def _fault(origin: _Origin) -> str:
    """Why a version can never be served, as far as its line tells."""
    if not is_id(origin.id):
        return f"its id {quote(origin.id)} is not valid: {why_not(origin.id)}"
    if origin.source == UPLOADED and not UPLOAD.fullmatch(origin.id):
        return f"its id {quote(origin.id)} is not an upload's"
    if not DIGEST.fullmatch(origin.digest):
        return f"its digest {quote(origin.digest)} is not 64 characters of 0-9 a-f"
    return ""


def _with_lines(content: Registered, data: bytes) -> Registered:
    """The content with the place of each fault in the file."""
    wrong = faulty(content)
    if not wrong:
        return content
    names, lines = {name: dict(versions) for name, versions in content.names.items()}, key_lines(data)
    for version in wrong:
        line = lines.get(("adapters", version.name, str(version.number)), 0)
        names[version.name][version.number] = replace(
            version, fault=f"line {line} of the registry file: {version.fault}"
        )
    return replace(content, names=names)
