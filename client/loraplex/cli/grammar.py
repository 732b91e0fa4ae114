"""The options that say what an answer must match."""

from typing import Annotated, TextIO

import typer

from loraplex.grammars import Choice, Grammar, JsonSchema, Lark, Regex

JsonSchemaFile = Annotated[
    typer.FileText | None,
    typer.Option("--json-schema", metavar="FILE", encoding="utf-8", help="Answer with a document of this JSON schema."),
]
RegexPattern = Annotated[str | None, typer.Option("--regex", help="Answer with a match of this expression.")]
Choices = Annotated[
    list[str] | None, typer.Option("--choice", help="Answer with one of these texts. Can be given several times.")
]
LarkFile = Annotated[
    typer.FileText | None,
    typer.Option("--lark", metavar="FILE", encoding="utf-8", help="Answer with a sentence of this grammar."),
]


def read_grammar(
    json_schema: TextIO | None, regex: str | None, choice: list[str] | None, lark: TextIO | None
) -> Grammar | None:
    """None if any answer will do. Raises typer.BadParameter if more than one is given, or a file is not UTF-8 text."""
    found = list[Grammar]()
    if json_schema:
        found.append(JsonSchema(read_text(json_schema, "--json-schema")))
    if regex:
        found.append(Regex(regex))
    if choice:
        found.append(Choice(choice))
    if lark:
        found.append(Lark(read_text(lark, "--lark")))
    if len(found) > 1:
        raise typer.BadParameter("give only one of --json-schema, --regex, --choice and --lark")
    return found[0] if found else None


def read_text(file: TextIO, flag: str) -> str:
    """Raises typer.BadParameter if the file is not UTF-8."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise typer.BadParameter("not UTF-8 text", param_hint=flag) from error
