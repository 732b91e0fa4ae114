"""Messages about adapters: files on their way to the shards, and what shards say of what they have staged."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.generation_pb2 import UploadedFile
from loraplex_router.vocabulary.adapter import Invocation, StagedAdapter
from loraplex_router.vocabulary.chat import AdapterTokenizer, ChatTemplates

UPLOAD_PART = 2**20  # bytes of a message


async def upload_parts(files: Mapping[str, memoryview]) -> AsyncIterator[pb.StageUploadRequest]:
    """What StageUpload sends of an adapter's files."""
    yield pb.StageUploadRequest(files=_announced(files))
    for data in _contents(files):
        yield pb.StageUploadRequest(data=data)


async def merge_parts(
    merge: pb.MergeAdaptersRequest, uploads: Mapping[str, Mapping[str, memoryview]]
) -> AsyncIterator[pb.MergeUploadsRequest]:
    """What MergeUploads sends, where files of these uploaded adapters, by digest, are needed again."""
    sent = [pb.SentAdapter(digest=digest, files=_announced(files)) for digest, files in uploads.items()]
    yield pb.MergeUploadsRequest(merge=merge, sent=sent)
    for files in uploads.values():
        for data in _contents(files):
            yield pb.MergeUploadsRequest(data=data)


def _announced(files: Mapping[str, memoryview]) -> list[UploadedFile]:
    return [UploadedFile(name=name, size_bytes=len(data)) for name, data in files.items()]


def _contents(files: Mapping[str, memoryview]) -> Iterator[bytes]:
    for data in files.values():
        for start in range(0, len(data), UPLOAD_PART):
            yield bytes(data[start : start + UPLOAD_PART])


def read_staged(ranks: Sequence[pb.StageAdapterResponse]) -> StagedAdapter:
    """From the answers of all ranks, rank 0 first."""
    first = ranks[0]
    return StagedAdapter(
        first.digest,
        first.source,
        first.revision,
        first.lora_rank,
        sum(rank.size_bytes for rank in ranks),
        max(rank.device_bytes for rank in ranks),
        _read_tokenizer(first),
        tuple(first.warnings),
        read_invocation(first),
        first.classifier if first.HasField("classifier") else None,
    )


def _read_tokenizer(staged: pb.StageAdapterResponse) -> AdapterTokenizer:
    default = {"default": staged.chat_template} if staged.chat_template else {}
    templates = ChatTemplates(default | dict(staged.named_chat_templates), dict(staged.special_tokens))
    ends, error = tuple(staged.end_token_ids), staged.chat_template_error
    defaults = {field.name: value for field, value in staged.sampling_defaults.ListFields()}
    return AdapterTokenizer(templates, ends, error, staged.tokenizer_json, staged.vocab_size, defaults)


def read_invocation(adapter: pb.StageAdapterResponse | pb.LocalAdapter) -> Invocation | None:
    """None: it is always active."""
    given = adapter.invocation
    return Invocation(tuple(given.token_ids), given.lag) if adapter.HasField("invocation") else None
