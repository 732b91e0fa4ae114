"""What callers get, from protobuf responses."""

from collections.abc import Iterable

from loraplex.types import (
    Adapter,
    AdapterResidence,
    AdapterState,
    AdapterTier,
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
    Usage,
)
from loraplex_protos import generation_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_END_TOKEN: FinishReason.END_TOKEN,
    pb.FINISH_REASON_STOP_TEXT: FinishReason.STOP_TEXT,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}

_TIERS = {
    pb.ADAPTER_TIER_DISK: AdapterTier.DISK,
    pb.ADAPTER_TIER_HOST: AdapterTier.HOST,
    pb.ADAPTER_TIER_DEVICE: AdapterTier.DEVICE,
}

_STATES = {
    pb.ADAPTER_STATE_AVAILABLE: AdapterState.AVAILABLE,
    pb.ADAPTER_STATE_FETCHING: AdapterState.FETCHING,
    pb.ADAPTER_STATE_LOADED: AdapterState.LOADED,
    pb.ADAPTER_STATE_UNLOADING: AdapterState.UNLOADING,
    pb.ADAPTER_STATE_BROKEN: AdapterState.BROKEN,
}


def generation(response: pb.GenerateResponse) -> Generation:
    return Generation(
        request_id=response.request_id,
        sequences=tuple(_sequence(sequence) for sequence in response.sequences),
        prompt=_prompt(response.prompt),
        adapter_digest=response.adapter_digest,
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
    )


def embeddings(response: pb.EmbedResponse) -> tuple[Embedding, ...]:
    return tuple(Embedding(tuple(given.values), given.prompt_tokens) for given in response.embeddings)


def token_spans(response: pb.TokenizeResponse) -> tuple[TokenSpan, ...]:
    return tuple(TokenSpan(token.id, token.text, token.start, token.stop) for token in response.tokens)


def adapter(status: pb.AdapterStatus) -> Adapter:
    return Adapter(
        id=status.id,
        source=status.source,
        revision=status.revision,
        digest=status.digest,
        tier=_TIERS.get(status.tier),
        lora_rank=status.lora_rank,
        size_bytes=status.size_bytes,
        running_sequences=status.running_sequences,
        waiting_sequences=status.waiting_sequences,
        state=_STATES.get(status.state, AdapterState.LOADED),
        requests=status.requests,
        last_used=status.last_used if status.HasField("last_used") else None,
        pinned=status.pinned,
        residences=tuple(
            AdapterResidence(
                residence.replica,
                _TIERS[residence.tier],
                residence.running_sequences,
                residence.waiting_sequences,
                residence.pinned,
            )
            for residence in status.residences
        ),
        warnings=tuple(status.warnings),
        reason=status.reason,
    )


def model_info(response: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        model_id=response.model_id,
        architecture=response.architecture,
        dtype=response.dtype,
        vocab_size=response.vocab_size,
        max_model_len=response.max_model_len,
        tensor_parallel_size=response.tensor_parallel_size,
        kv_block_size=response.kv_block_size,
        kv_blocks=response.kv_blocks,
        max_batch_tokens=response.max_batch_tokens,
        max_adapters_on_device=response.max_adapters_on_device,
        version=response.version,
        has_chat_template=response.has_chat_template,
        served_model_names=tuple(response.served_model_names),
        adapter_sources=tuple(response.adapter_sources),
    )


def _sequence(sequence: pb.GeneratedSequence) -> GeneratedSequence:
    return GeneratedSequence(
        text=sequence.text,
        tokens=_tokens(sequence.tokens),
        finish_reason=_FINISH_REASONS[sequence.finish_reason],
        usage=_usage(sequence.usage),
        seed=sequence.seed if sequence.HasField("seed") else None,
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
    return Usage(usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens)
