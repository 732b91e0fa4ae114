"""The names of the tensors in an adapter's file. They may be PEFT's own names, or those of a state dict that was saved
as it was in training."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.shapes.names import current_name

PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)|^module(?=\.)")
_PREFIXES = re.compile(r"^\.?(?:base_model\.model\.)*")
# The adapter's name in a tensor's name, which PEFT leaves out. After DoRA's vectors it leaves out "weight" as well.
_NAMED = re.compile(
    r"(\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)|(\.(?:lora_embedding_[AB]|trainable_tokens_delta))\.[^.]+$"
)
_TOKENS = re.compile(r"\.(trainable_tokens_delta|base_layer\.weight)$")
_OF_A_LAYER = re.compile(r"\d+(?:\.(?!lora_)[a-z]\w*)+\.lora_[AB]\.weight")  # by PEFT's own name
_MAGNITUDE = re.compile(r"(\.lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?$")


# The text model in a model that also reads pictures, and the other parts of such a model.
_TEXT_MODELS = "model.language_model", "language_model.model", "model.text_model", "model"
_OTHER_PARTS = re.compile(
    rf"^{re.escape(PREFIX)}(?:model\.)?"
    r"(?:visual|vision_tower|vision_model|image_tower|multi_modal_projector|connector|aligner|vision_adapter|embed_vision|vision_encoder|vision_projection|audio_tower|embed_audio)\."
)


def as_saved_by_peft(names: Iterable[str], backbone: str = "model") -> dict[str, str]:
    """Maps PEFT's name of each tensor to its name in the file.

    PEFT's names have no prefixes of DistributedDataParallel, FSDP and torch.compile, PEFT's own prefix once, the
    current name of the model that holds the layers (`backbone`), and no adapter's name after lora_A and lora_B.

    Raises AdapterInvalidError if two tensors get the same name.
    """
    found: dict[str, str] = {}
    layers = f"{PREFIX}{backbone}.layers."
    for name in names:
        is_plain = name.startswith(layers) and _OF_A_LAYER.fullmatch(name, len(layers))  # as nearly all are
        plain = name if is_plain else _plain(name, backbone)
        if plain in found:
            raise AdapterInvalidError(
                f"adapter_model.safetensors: {found[plain][:200]} and {name[:200]} are both {plain[:200]}"
            )
        found[plain] = name
    return found


def below_adapters_of_tokens(names: Mapping[str, str]) -> dict[str, str]:
    """The names of PEFT's tuner of single tokens, as they are where LoRA trains tokens, too."""
    return {_TOKENS.sub(r".token_adapter\g<0>", name): own for name, own in names.items()}


def _plain(name: str, backbone: str) -> str:
    bare = _PREFIXES.sub("", _WRAPPERS.sub(r"\1", name).replace("..", "."))
    plain = PREFIX + (current_name(bare, backbone) or bare)
    return _MAGNITUDE.sub(r"\1", _NAMED.sub(r"\1\2", plain))


def is_of_another_part(name: str) -> bool:
    """Whether a tensor, by PEFT's name, adapts the part of a model that reads pictures or sound."""
    return _OTHER_PARTS.match(name) is not None


def former_names(modules: Sequence[str], backbone: str) -> Iterator[dict[str, str]]:
    """The modules by their names in other versions of transformers, or in the text model by itself."""
    for other in _TEXT_MODELS:
        if other != backbone:
            yield {re.sub(rf"^{re.escape(backbone)}(?=\.)", other, module): module for module in modules}
