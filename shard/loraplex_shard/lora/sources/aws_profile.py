"""What `aws configure` wrote, for a server on somebody's own machine: obstore knows variables and roles, but not those
files."""

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
    """What variables leave open of keys and region, from AWS_PROFILE or the default profile, as obstore calls it.

    Raises ValueError if AWS_PROFILE is set and has no keys, as that of a login or of a role to assume, or if a file
    cannot be parsed.
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
    """Of a file, which need not be there."""
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(os.environ.get(variable) or Path.home() / ".aws" / name)
    except Error:
        raise ValueError(f"~/.aws/{name} cannot be parsed") from None
    return dict(parser[section]) if parser.has_section(section) else {}
