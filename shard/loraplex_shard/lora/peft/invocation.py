"""The tokens in a prompt that activate an adapter (aLoRA, arXiv 2504.12397). The router looks for them."""

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.weights.deltas import Invocation


def read_invocation(config: AdapterConfig, base: BaseModel) -> Invocation | None:
    """Returns what activates the adapter; None if it is always active. Raises AdapterInvalidError if no prompt can
    contain it.

    PEFT's adapters have tokens, and act from the first of them on. The library before PEFT (`pip install alora`) has a
    text, and its adapters act from the second token on. PEFT ignores that text, so the adapter acts everywhere.
    """
    if config.alora_invocation_tokens is not None:
        name, found = "alora_invocation_tokens", Invocation(tuple(config.alora_invocation_tokens))
    elif config.invocation_string is not None:
        if base.tokenizer is None:
            raise AdapterInvalidError("adapter_config.json: invocation_string: the model has no tokenizer to read it")
        encoded = base.tokenizer.encode(config.invocation_string, add_special_tokens=False)
        name, found = "invocation_string", Invocation(tuple(encoded.ids), lag=1)
    else:
        return None
    if unknown := [token for token in found.token_ids if token >= base.vocab_size]:
        raise AdapterInvalidError(
            f"adapter_config.json: {name}: the model has no token {unknown[0]}, only those below {base.vocab_size}: the"
            " adapter was made for another base"
        )
    if not found.token_ids:
        raise AdapterInvalidError(f"adapter_config.json: {name}: it has no tokens, so nothing would activate it")
    return found
