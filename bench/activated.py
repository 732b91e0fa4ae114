"""`python -m bench.activated`: how much activated adapters (aLoRA) save in a pipeline that asks the base model about a
long document, and then five adapters one after the other: their time to the first token compared with plain adapters.

Both kinds have the same weights and get the same prompts, whose documents are new. Nothing else should run at the same
time.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from peft import LoraConfig, get_peft_model
from rich.console import Console

from bench.engine.served import serving
from bench.peft_target import load_model
from loraplex import Client

DOCUMENT, ADAPTERS, ROUNDS = 4000, 5, 5
ANSWER = 32  # tokens of the base model's answer, which the adapters also read
INVOCATION = (7, 8, 9)  # tokens that do not occur in documents
LEAST, VOCABULARY = 10, 10_000
WANTED = 3.0


def save_adapters(directory: Path) -> dict[str, list[str]]:
    """The names of plain and activated adapters: r=32 on the attention's inputs, like IBM's."""
    names: dict[str, list[str]] = {"plain": [], "activated": []}
    base = load_model("default")
    for number in range(ADAPTERS):
        targets = ["q_proj", "k_proj", "v_proj"]
        model = get_peft_model(base, LoraConfig(r=32, target_modules=targets, task_type="CAUSAL_LM"))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.01)
        for kind, tokens in (("plain", None), ("activated", list(INVOCATION))):
            model.peft_config["default"].alora_invocation_tokens = tokens  # type: ignore[attr-defined]
            names[kind].append(f"{kind}-{number}")
            model.save_pretrained(str(directory / names[kind][-1]))
        base = model.unload()
    return names


def seconds_to_first_tokens(client: Client, adapters: Sequence[str], seed: int) -> float:
    """The sum of the times to the first token of all adapters, after the base model has answered."""
    document = Random(seed).choices(range(LEAST, VOCABULARY), k=DOCUMENT)
    answer = client.generate(document, max_new_tokens=ANSWER, ignore_eos=True)
    question = [*document, *(token.id for token in answer.sequences[0].tokens), *INVOCATION]
    spent = 0.0
    for adapter in adapters:
        began = time.monotonic()
        stream = client.stream(question, adapter=adapter, max_new_tokens=4, ignore_eos=True)
        next(stream)
        spent += time.monotonic() - began
        for _ in stream:
            pass
    return spent


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        names = save_adapters(Path(directory))
        flags = f"--kv-blocks={8 * DOCUMENT // 16}", f"--max-adapters-on-device={2 * ADAPTERS}"
        with serving("--adapters", directory, *flags) as addresses, Client(addresses["grpc"]) as client:
            spent: dict[str, list[float]] = {kind: [] for kind in names}
            for number in range(-1, ROUNDS):  # the first round loads the adapters and does not count
                for kind, adapters in names.items():
                    seconds = seconds_to_first_tokens(client, adapters, number)
                    if number >= 0:
                        spent[kind].append(seconds)
    ratio = statistics.median(plain / own for plain, own in zip(spent["plain"], spent["activated"], strict=True))
    each = {kind: statistics.median(seconds) / ADAPTERS * 1e3 for kind, seconds in spent.items()}
    mark = "[green]" if ratio >= WANTED else "[yellow]"
    console.print(
        f"time to first token after {DOCUMENT} tokens, plain ÷ activated  {WANTED:.2f}  {mark}{ratio:.2f}[/]"
        f"  {each['plain']:.0f} and {each['activated']:.0f} ms",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
