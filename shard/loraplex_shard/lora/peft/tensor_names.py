"""What the tensors in an adapter's file are called, whichever way they came there: PEFT's own names, or a state dict
that was saved as it was in training."""

import re
from collections.abc import Iterable

from loraplex_protos.errors import AdapterInvalidError

PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)|^module(?=\.)")
_PREFIXES = re.compile(r"^\.?(?:base_model\.model\.)*")
_BACKBONE = re.compile(
    r"^(?=(?:layers|embed_tokens|norm)\.)"
)  # of a model without a head, as embedding models are trained
_NAMED = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")  # the adapter's own name, which PEFT leaves out


def as_saved_by_peft(names: Iterable[str]) -> dict[str, str]:
    """For PEFT's name of each tensor the one in the file: without the prefixes that DistributedDataParallel, FSDP and
    torch.compile put before names, with PEFT's own once, with what a head sets apart, and without an adapter's name
    behind lora_A and lora_B.

    Raises AdapterInvalidError if two names come to the same.
    """
    found: dict[str, str] = {}
    for name in names:
        bare = _PREFIXES.sub("", _WRAPPERS.sub(r"\1", name).replace("..", "."))
        plain = PREFIX + _BACKBONE.sub("model.", bare)
        plain = _NAMED.sub(r".lora_\1.weight", plain)
        if plain in found:
            raise AdapterInvalidError(
                f"adapter_model.safetensors: {found[plain][:200]} and {name[:200]} are both {plain[:200]}"
            )
        found[plain] = name
    return found
