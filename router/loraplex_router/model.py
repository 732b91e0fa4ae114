"""What is served, the same by every group: the model as the faces describe it, its tokenizer and its limits."""

from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version

import jinja2

from loraplex_protos import generation_pb2, shard_pb2
from loraplex_protos.errors import UnavailableError
from loraplex_router.text.chat import ChatTemplate
from loraplex_router.text.foreign_templates import ForeignTemplates
from loraplex_router.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """As the first group told it."""

    info: generation_pb2.GetModelInfoResponse
    tokenizer: Tokenizer
    tokenizer_digest: str
    end_token_ids: tuple[int, ...]
    templates: ForeignTemplates  # for the chat templates that adapters bring along

    def check_fits(self, other: "Model") -> None:
        """Raises UnavailableError if a group that serves `other` cannot serve this."""
        for name in ("model_id", "architecture", "dtype", "vocab_size"):
            here, there = getattr(self.info, name), getattr(other.info, name)
            if here != there:
                raise UnavailableError(f"its {name} is {there!r}, that of the groups before is {here!r}")
        if self.tokenizer_digest != other.tokenizer_digest or self.end_token_ids != other.end_token_ids:
            raise UnavailableError("its tokenizer is not that of the groups before")
        if other.info.max_model_len < self.info.max_model_len:
            length = f"{other.info.max_model_len}, that of the groups before {self.info.max_model_len}"
            raise UnavailableError(f"its max_model_len is {length}: give it as many blocks, or all a --max-model-len")


def read_model(
    info: shard_pb2.GetInfoResponse,
    files: shard_pb2.GetTokenizerResponse,
    max_batch_tokens: int,
    max_adapters_on_device: int,
) -> Model:
    """Raises UnavailableError if the chat template cannot be read."""
    tokenizer = _read_tokenizer(files)
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
            max_batch_tokens=max_batch_tokens,
            max_adapters_on_device=max_adapters_on_device,
            version=version("loraplex"),
            has_chat_template=tokenizer.chat_template is not None,
        ),
        tokenizer,
        sha256(files.SerializeToString(deterministic=True)).hexdigest(),
        tuple(info.end_token_ids),
        ForeignTemplates(files.bos_token, files.eos_token),
    )


def _read_tokenizer(files: shard_pb2.GetTokenizerResponse) -> Tokenizer:
    template = None
    if files.chat_template:
        try:
            template = ChatTemplate(files.chat_template, files.bos_token, files.eos_token)
        except jinja2.TemplateError as error:
            raise UnavailableError(f"the model's chat template cannot be read: {error}") from error
    return Tokenizer(files.tokenizer_json, template)
