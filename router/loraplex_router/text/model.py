"""The served model, the same on every replica: its description, tokenizer and limits."""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version

from loraplex_protos import generation_pb2, shard_pb2
from loraplex_protos.errors import UnavailableError
from loraplex_router.text.reasoning import AUTO, find_thoughts
from loraplex_router.text.renderer import Renderer
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.chat import ChatTemplates, RenderedChat
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.thoughts import Thoughts

KEPT_TOKENIZERS = 32  # the model's, and those of adapters with tokens of their own

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """The model as described by the first replica."""

    info: generation_pb2.GetModelInfoResponse
    tokenizer: Tokenizer
    tokenizer_digest: str
    end_token_ids: tuple[int, ...]
    chat_templates: ChatTemplates
    renderer: Renderer
    sampling_defaults: Sampling = field(default_factory=Sampling)  # for requests on OpenAI's routes
    follows_generation_config: bool = False  # the model's and adapters' own
    reasoning_parser: str = AUTO  # see text/reasoning.py

    def vocab_size(self, adapter: Adapter) -> int:
        """How many tokens there are for answers of the adapter."""
        return adapter.tokenizer.vocab_size or self.info.vocab_size

    def tokenizer_of(self, adapter: Adapter) -> Tokenizer:
        """The adapter's own tokenizer, or else the model's."""
        return _read_tokenizer(adapter.tokenizer.json) if adapter.tokenizer.json else self.tokenizer

    async def read_tokenizer(self, adapter: Adapter) -> Tokenizer:
        """The same, for its first use: a large tokenizer takes part of a second to read."""
        return await asyncio.to_thread(self.tokenizer_of, adapter) if adapter.tokenizer.json else self.tokenizer

    def thoughts(self, prompt: RenderedChat, adapter: Adapter) -> Thoughts | None:
        """Those that the answer may begin with; None if it has none."""
        templates = adapter.tokenizer.over(self.chat_templates).by_name.values()
        return find_thoughts(self.reasoning_parser, templates, prompt.text)

    @property
    def names(self) -> tuple[str, ...]:
        """The base model's names on OpenAI's routes: answers have the first, requests may use any."""
        return tuple(self.info.served_model_names) or (self.info.model_id,)

    @property
    def classifier(self) -> generation_pb2.Classifier | None:
        return self.info.classifier if self.info.HasField("classifier") else None

    def check_fits(self, other: "Model") -> None:
        """Raises UnavailableError if a replica with the model `other` cannot serve this one."""
        for name in ("model_id", "architecture", "dtype", "vocab_size"):
            here, there = getattr(self.info, name), getattr(other.info, name)
            if here != there:
                raise UnavailableError(f"its {name} is {there!r}, but the earlier replicas have {here!r}")
        if self.tokenizer_digest != other.tokenizer_digest or self.end_token_ids != other.end_token_ids:
            raise UnavailableError("its tokenizer differs from the earlier replicas'")
        if other.classifier != self.classifier:
            raise UnavailableError("its classifier differs from the earlier replicas'")
        if other.info.max_model_len < self.info.max_model_len:
            length = f"{other.info.max_model_len}, but the earlier replicas have {self.info.max_model_len}"
            raise UnavailableError(f"its max_model_len is {length}: give it as many blocks, or set all --max-model-len")


def read_model(
    info: shard_pb2.GetInfoResponse,
    files: shard_pb2.GetTokenizerResponse,
    max_adapters_on_device: int,
    served_model_names: Collection[str] = (),
    generation_config: str = "vllm",
    reasoning_parser: str = AUTO,
) -> Model:
    """A replica's model, from its answers."""
    templates = _read_templates(files)
    return Model(
        generation_pb2.GetModelInfoResponse(
            model_id=info.model_id,
            architecture=info.architecture,
            dtype=info.dtype,
            vocab_size=info.vocab_size,
            max_model_len=min(info.max_model_len, info.num_blocks * info.block_size),
            tensor_parallel_size=info.tensor_parallel_size,
            kv_block_size=info.block_size,
            kv_blocks=info.num_blocks,
            max_batch_tokens=info.max_batch_tokens,
            max_adapters_on_device=max_adapters_on_device,
            version=version("loraplex"),
            has_chat_template=bool(templates.by_name),
            served_model_names=served_model_names or (info.model_id,),
            adapter_sources=info.adapter_sources,
            modeling_code=info.modeling_code,
            embeds_only=info.embeds_only,
            state_bytes=info.state_bytes,
            is_matryoshka=info.is_matryoshka,
            matryoshka_dimensions=info.matryoshka_dimensions,
            memory_bytes=info.memory.total,
            kv_cache_bytes=info.memory.cache,
            adapter_bytes=info.memory.adapters,
            step_bytes=info.memory.steps,
            classifier=info.classifier if info.HasField("classifier") else None,
        ),
        _read_tokenizer(files.tokenizer_json),
        sha256(files.SerializeToString(deterministic=True)).hexdigest(),
        tuple(info.end_token_ids),
        templates,
        Renderer(templates),
        _read_defaults(info.sampling_defaults) if generation_config == "auto" else Sampling(),
        generation_config == "auto",
        reasoning_parser,
    )


# Reading one holds the interpreter's lock for part of a second: another replica of the same model has the same one.
_read_tokenizer = lru_cache(maxsize=KEPT_TOKENIZERS)(Tokenizer)


def _read_defaults(told: generation_pb2.Sampling) -> Sampling:
    named = {field.name: value for field, value in told.ListFields()}
    if named:
        values = ", ".join(f"{name} {value:g}" for name, value in named.items())
        logger.info("default sampling parameters of OpenAI's routes, from the model's files: %s", values)
    return Sampling(**named)


def _read_templates(files: shard_pb2.GetTokenizerResponse) -> ChatTemplates:
    default = {"default": files.chat_template} if files.chat_template else {}
    named = {"bos_token": files.bos_token, "eos_token": files.eos_token}
    special_tokens = {name: token for name, token in named.items() if token} | dict(files.special_tokens)
    return ChatTemplates(default | dict(files.named_chat_templates), special_tokens)
