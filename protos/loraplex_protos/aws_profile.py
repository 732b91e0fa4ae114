"""Reads the files that `aws configure` writes, for a server on a user's own machine. obstore reads variables and roles,
but not these files."""

import os
from configparser import ConfigParser, Error
from pathlib import Path
from typing import Any

_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_IDENTITIES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")


def read_profile() -> dict[str, Any]:
    """The keys and the region that variables do not set, from AWS_PROFILE or the default profile, by obstore's names.

    Raises ValueError if a file cannot be parsed, or if AWS_PROFILE is set and has no keys, because it is for a login or
    for a role to assume.
    """
    profile = os.environ.get("AWS_PROFILE", "default")
    found = _section("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}")
    found |= _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    options: dict[str, Any] = {ours: found[theirs] for theirs, ours in _KEYS.items() if theirs in found}
    if any(map(os.environ.get, _IDENTITIES)):
        options = {}
    elif "AWS_PROFILE" in os.environ and "secret_access_key" not in options:
        raise ValueError(
            f"AWS_PROFILE: the profile {profile!r} contains no keys: log in, then set variables with "
            'eval "$(aws configure export-credentials --format env)"'
        )
    if "region" in found and not any(map(os.environ.get, _REGIONS)):
        options["region"] = found["region"]
    return options


def _section(variable: str, name: str, section: str) -> dict[str, str]:
    """A section of a file. It is empty if the file does not exist."""
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(os.environ.get(variable) or Path.home() / ".aws" / name)
    except Error:
        raise ValueError(f"~/.aws/{name} cannot be parsed") from None
    return dict(parser[section]) if parser.has_section(section) else {}
