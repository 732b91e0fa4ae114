"""The options shared by `generate` and `chat`."""

from typing import Annotated

import typer

Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="The adapter to use: see `loraplex adapters list`. Default: the base model."),
]
System = Annotated[str | None, typer.Option("--system", help="The system message, instead of the model's own.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-m", min=1, help="Maximum number of tokens to generate.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", min=0, help="Higher is more varied; 0 is greedy."),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Sample from the most likely tokens whose probabilities add up to this.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same answer.")]
