"""Whether two names of base models can mean the same weights. Mirrors and quantized copies of a model are the model:
"unsloth/Llama-3-8B-Instruct-bnb-4bit" is "meta-llama/Meta-Llama-3-8B-Instruct". A model that was tuned further, as an
instruct model is, has other weights and another name.
"""

import re
from collections.abc import Sequence

_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)--([^/\\]+)(?=[/\\]|$)")  # the hub's cache
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SIZE = re.compile(r"(?<![a-z0-9])\d+(\.\d+)?[bm](?![a-z0-9])")  # 7B, 1.5b, 135M
# What a trainer calls its own folders.
_WORK = re.compile(
    r"\W*(adapters?|base|checkpoints?|data|final|hf|llms?|merged|models?|mnt|out|outputs?|results?|runs?|saves?|"
    r"tmp|train(ed|ing)?|weights|work(space)?|checkpoint[-_]\d+)\W*"
)
_COPY = re.compile(
    r"[-_.](unsloth|bnb|nf4|fp4|[248]-?bit|gptq|awq|int[48]|w\d+a\d+|fp8|fp16|bf16|[bf]?f(16|32)|hf|gguf|mlx|exl2|"
    r"i?q\d(_\w+)*|sharded|quantized|quant|dynamic|marlin|autoround|g?\d+g|safetensors)$"
)


def differs(name: str, ids: Sequence[str]) -> bool:
    """Whether the name, of a base as an adapter's trainer knew it, is that of another model than the one of these ids.
    False where it tells nothing, as the path of a folder that somebody trained in."""
    return bool(ids) and _tells(name) and all(_key(name) != _key(id) for id in ids)


def _tells(name: str) -> bool:
    """Whether it names a model at all."""
    name = _hub_id(name)
    if _SIZE.search(_last(name)):
        return True
    return _HUB_ID.fullmatch(name) is not None and not any(map(_WORK.fullmatch, name.casefold().split("/")))


def _hub_id(name: str) -> str:
    cached = _CACHED.search(name)
    return "/".join(cached.groups()) if cached else name


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def _key(name: str) -> str:
    """The same for all copies of a model."""
    key = _last(_hub_id(name)).removeprefix("meta-")
    while (shorter := _COPY.sub("", key)) != key:
        key = shorter
    return re.sub(r"[\W_]+", "", key)
