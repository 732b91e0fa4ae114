"""docs/operating.md names all exported metrics and nothing else."""

import re
from pathlib import Path

import yaml
from typer.core import TyperGroup
from typer.main import get_command

from loraplex.cli.main import app
from loraplex_router.settings import RouterSettings
from loraplex_shard.settings import NodeSettings
from tests.operate.exported import router_names, shard_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operating.md").read_text()


async def test_every_metric_is_in_the_table_and_the_table_has_no_other():
    named = sorted(re.findall(r"^\| `(loraplex_\w+)` \|", PAGE, re.MULTILINE))
    exported = {name for name in await router_names() | shard_names() if name.startswith("loraplex_")}
    histograms = {name.removesuffix("_bucket") for name in exported if name.endswith("_bucket")}
    parts = {f"{name}{suffix}" for name in histograms for suffix in ("_bucket", "_sum", "_count")}
    assert named == sorted(exported - parts | histograms)


def test_every_alert_is_explained():
    rules = yaml.safe_load((ROOT / "charts" / "loraplex" / "rules" / "alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert re.findall(r"^\| (Loraplex\w+) \|", PAGE, re.MULTILINE) == alerts


def test_every_flag_exists():
    flags = set(re.findall(r"`(?:loraplex top )?(--[a-z-]+)", PAGE))
    settings = RouterSettings.model_fields.keys() | NodeSettings.model_fields.keys()
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    of_top = {flag for parameter in command.commands["top"].params for flag in parameter.opts}
    known = {f"--{name.replace('_', '-')}" for name in settings} | of_top
    assert flags and flags <= known
