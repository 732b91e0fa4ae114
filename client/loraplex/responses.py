"""Converts protobuf responses to the SDK's types."""

from collections.abc import Iterable
from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message as Proto

from loraplex.types import (
    Adapter,
    AdapterResidence,
    AdapterState,
    AdapterTier,
    Classification,
    ClassifiedToken,
    Classifier,
    Embedding,
    FinishReason,
    GeneratedSequence,
    Generation,
    ModelInfo,
    PromptToken,
    StreamPiece,
    Token,
    TokenLogprob,
    TokenSpan,
    ToolCall,
    ToolCallPart,
    Usage,
)
from loraplex_protos import generation_pb2 as pb

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


def _by_number(kind: type[E], values: EnumDescriptor, prefix: str) -> dict[int, E]:
    return {values.values_by_name[prefix + member.name].number: member for member in kind}


_FINISH_REASONS = _by_number(FinishReason, pb.FinishReason.DESCRIPTOR, "FINISH_REASON_")
_TIERS = _by_number(AdapterTier, pb.AdapterTier.DESCRIPTOR, "ADAPTER_TIER_")
_STATES = _by_number(AdapterState, pb.AdapterState.DESCRIPTOR, "ADAPTER_STATE_")


def _read(kind: type[T], message: Proto, **others: object) -> T:
    """A dataclass from a message with fields of the same names, except `others`."""
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in others]
    return kind(**{name: getattr(message, name) for name in names}, **others)


def generation(response: pb.GenerateResponse) -> Generation:
    return Generation(
        request_id=response.request_id,
        sequences=tuple(_sequence(sequence) for sequence in response.sequences),
        prompt=_prompt(response.prompt),
        adapter_digest=response.adapter_digest,
        adapter_version=response.adapter_version,
        warnings=tuple(response.warnings),
    )


def stream_piece(response: pb.GenerateStreamResponse) -> StreamPiece:
    return StreamPiece(
        request_id=response.request_id,
        index=response.index,
        text=response.text,
        tokens=_tokens(response.tokens),
        finish_reason=_FINISH_REASONS[response.finish_reason] if response.finish_reason else None,
        usage=_usage(response.usage) if response.HasField("usage") else None,
        seed=response.seed if response.HasField("seed") else None,
        prompt=_prompt(response.prompt),
        adapter_digest=response.adapter_digest,
        adapter_version=response.adapter_version,
        warnings=tuple(response.warnings),
        adapter=response.adapter,
        reasoning=response.reasoning,
        tool_calls=tuple(
            ToolCallPart(part.index, part.call.id, part.call.name, part.call.arguments) for part in response.tool_calls
        ),
    )


def embeddings(response: pb.EmbedResponse) -> tuple[Embedding, ...]:
    return tuple(
        _read(Embedding, given, values=tuple(given.values), warnings=tuple(given.warnings))
        for given in response.embeddings
    )


def classifications(response: pb.ClassifyResponse) -> tuple[Classification, ...]:
    labels = tuple(response.classifier.labels)
    return tuple(
        Classification(
            label=given.label,
            scores=dict(zip(labels, given.scores, strict=False)),
            tokens=tuple(
                _read(ClassifiedToken, token, scores=dict(zip(labels, token.scores, strict=True)))
                for token in given.tokens
            ),
            prompt_tokens=given.prompt_tokens,
        )
        for given in response.classifications
    )


def _classifier(message: pb.AdapterStatus | pb.GetModelInfoResponse) -> Classifier | None:
    if not message.HasField("classifier"):
        return None
    return _read(Classifier, message.classifier, labels=tuple(message.classifier.labels))


def token_spans(response: pb.TokenizeResponse) -> tuple[TokenSpan, ...]:
    return tuple(TokenSpan(token.id, token.text, token.start, token.stop) for token in response.tokens)


def adapter(status: pb.AdapterStatus) -> Adapter:
    return _read(
        Adapter,
        status,
        tier=_TIERS.get(status.tier),
        state=_STATES.get(status.state, AdapterState.LOADED),
        last_used=status.last_used if status.HasField("last_used") else None,
        fetched_bytes=status.fetched_bytes if status.HasField("fetched_bytes") else None,
        total_bytes=status.total_bytes if status.HasField("total_bytes") else None,
        residences=tuple(_read(AdapterResidence, each, tier=_TIERS[each.tier]) for each in status.residences),
        warnings=tuple(status.warnings),
        invocation_token_ids=tuple(status.invocation_token_ids),
        classifier=_classifier(status),
        targets={target.adapter: target.percent for target in status.targets},
    )


def model_info(response: pb.GetModelInfoResponse) -> ModelInfo:
    names, sources = tuple(response.served_model_names), tuple(response.adapter_sources)
    return _read(
        ModelInfo, response, served_model_names=names, adapter_sources=sources, classifier=_classifier(response)
    )


def _sequence(sequence: pb.GeneratedSequence) -> GeneratedSequence:
    return GeneratedSequence(
        text=sequence.text,
        tokens=_tokens(sequence.tokens),
        finish_reason=_FINISH_REASONS[sequence.finish_reason],
        usage=_usage(sequence.usage),
        seed=sequence.seed if sequence.HasField("seed") else None,
        adapter=sequence.adapter,
        adapter_digest=sequence.adapter_digest,
        adapter_version=sequence.adapter_version,
        reasoning=sequence.reasoning,
        tool_calls=tuple(_read(ToolCall, call) for call in sequence.tool_calls),
    )


def _tokens(tokens: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=token.id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            alternatives=_alternatives(token.alternatives),
            bytes=token.partial or token.text.encode(),
        )
        for token in tokens
    )


def _prompt(tokens: Iterable[pb.PromptToken]) -> tuple[PromptToken, ...]:
    return tuple(
        PromptToken(
            id=token.id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            alternatives=_alternatives(token.alternatives),
            bytes=token.partial or token.text.encode(),
        )
        for token in tokens
    )


def _alternatives(tokens: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token.id, token.text, token.logprob, token.partial or token.text.encode()) for token in tokens
    )


def _usage(usage: pb.Usage) -> Usage:
    return _read(Usage, usage)
