"""Command-line flags from a settings class: one flag and one LORAPLEX_* variable per field, with the field's name."""

import inspect
import logging
import os
from typing import Annotated, Any, TypeVar, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from loraplex.cli.flags_help import describe
from loraplex.cli.habits import translated
from loraplex.cli.output import width
from loraplex.cli.variables import foreign, former, is_service_link, variable, without_effect

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=BaseModel)


def parse(kind: type[Settings], arguments: list[str], command: str, text: str, positional: str = "") -> Settings:
    """The settings from the arguments and the environment; flags take precedence.

    `positional` names the field that is given without a flag, `text` is the command's help. Raises typer's usage
    errors, and typer.Exit after --help.
    """
    if "--help" in arguments:
        typer.echo(describe(kind, command, text, positional, width()))
        raise typer.Exit()

    own = kind.model_fields
    if hint := translated(arguments, own, _others(command), positional) or former(own, os.environ):
        raise typer.BadParameter(hint)

    def collect(**values: Any) -> Settings:
        try:
            return kind(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise typer.BadParameter(_describe(error, kind)) from error

    parameters = [_parameter(name, field, name == positional) for name, field in kind.model_fields.items()]
    collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(collect)
    parsed = typer.main.get_command(app).main(arguments, prog_name=f"loraplex {command}", standalone_mode=False)
    if not isinstance(parsed, kind):
        raise typer.Exit(parsed or 0)
    if refused := [text for text, serious in foreign(own, _given(parsed), os.environ) if serious]:
        raise typer.BadParameter("\n".join(f"{text}; set that, or unset the variable" for text in refused))
    return parsed


def warn_of_variables(settings: BaseModel, command: str) -> None:
    """Logs the variables that look like settings and have no effect on the command."""
    own = type(settings).model_fields
    for text in without_effect(command, own, _others(command), os.environ):
        logger.warning("%s", text)
    for text, _ in foreign(own, _given(settings), os.environ):
        logger.warning("%s", text)


def _given(settings: BaseModel) -> set[str]:
    """The settings that are not at their defaults."""
    return {name for name, field in type(settings).model_fields.items() if getattr(settings, name) != field.default}


def _others(command: str) -> dict[str, frozenset[str]]:
    """The settings of the other commands. What `serve` has is a part of both."""
    from loraplex_router.settings import RouterSettings
    from loraplex_shard.settings import NodeSettings

    kinds: dict[str, type[BaseModel]] = {"router": RouterSettings, "shard": NodeSettings}
    return {other: frozenset(kind.model_fields) for other, kind in kinds.items() if other != command}


def _parameter(name: str, field: FieldInfo, positional: bool) -> inspect.Parameter:
    envvar = variable(name)
    if is_service_link(envvar, os.environ.get(envvar, "")):
        envvar = ""
    option = typer.Argument if positional else typer.Option
    flag = () if positional else (f"--{name.replace('_', '-')}",)
    annotation: Any = str if get_origin(field.annotation) is tuple else field.annotation  # "a,b": the field splits it
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, option(*flag, envvar=envvar or None, help=field.description)],
    )


def _describe(error: ValidationError, kind: type[BaseModel]) -> str:
    """Each invalid setting on its own line, by its flag."""
    lines = []
    for detail in error.errors():
        message = detail["msg"].removeprefix("Value error, ")
        name, colon, rest = message.partition(": ")
        if detail["loc"]:
            name, rest = str(detail["loc"][0]), message
        elif not colon or name not in kind.model_fields:
            lines.append(message)
            continue
        lines.append(f"--{name.replace('_', '-')}: {rest}")
    return "\n".join(lines)
