"""The options that `generate` and `chat` have in common."""

from typing import Annotated

import typer

Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="The adapter to use: see `loraplex adapters list`. Default: the base model."),
]
System = Annotated[str | None, typer.Option("--system", help="The system message, in place of the model's own.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-m", min=1, help="The most tokens to generate.")]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", min=0, help="Higher is more varied; 0 takes the likeliest."),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Choose among the likeliest tokens that add up to this probability.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same answer.")]
