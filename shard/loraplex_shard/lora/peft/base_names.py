"""Whether two names of base models can stand for the same weights. Mirrors and quantized copies count as the same
model: "unsloth/Llama-3-8B-Instruct-bnb-4bit" is "meta-llama/Meta-Llama-3-8B-Instruct". A model that was trained
further, such as an instruct model, has other weights and another name.
"""

import re
from collections.abc import Sequence

_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)--([^/\\]+)(?=[/\\]|$)")  # the hub's cache
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SIZE = re.compile(r"(?<![a-z0-9])\d+(\.\d+)?[bm](?![a-z0-9])")  # 7B, 1.5b, 135M
# Names that trainers give to their own folders.
_WORK = re.compile(
    r"\W*(adapters?|base|checkpoints?|data|final|hf|llms?|merged|models?|mnt|out|outputs?|results?|runs?|saves?|"
    r"tmp|train(ed|ing)?|weights|work(space)?|checkpoint[-_]\d+)\W*"
)
_COPY = re.compile(
    r"[-_.](unsloth|bnb|nf4|fp4|[248]-?bit|gptq|awq|int[48]|w\d+a\d+|fp8|fp16|bf16|[bf]?f(16|32)|hf|gguf|mlx|exl2|"
    r"i?q\d(_\w+)*|sharded|quantized|quant|dynamic|marlin|autoround|g?\d+g|safetensors)$"
)


def differs(name: str, ids: Sequence[str]) -> bool:
    """Whether an adapter's name for its base stands for another model than these ids. False if the name says nothing,
    such as the path of somebody's training folder."""
    return bool(ids) and _tells(name) and all(_key(name) != _key(id) for id in ids)


def _tells(name: str) -> bool:
    """Whether the name is the name of a model."""
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
    """A key that all copies of a model have in common."""
    key = _last(_hub_id(name)).removeprefix("meta-")
    while (shorter := _COPY.sub("", key)) != key:
        key = shorter
    return re.sub(r"[\W_]+", "", key)
