"""Protobuf requests from what callers give. Knows the fields' names and types; what they mean, the server checks."""

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from google.protobuf.message import Message as Proto

from loraplex.grammars import Grammar, to_proto
from loraplex.types import AdapterReference, MergedAdapters, Message, Prompt
from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import FieldViolation, InvalidRequestError

P = TypeVar("P", bound=Proto)
R = TypeVar("R", pb.GenerateRequest, pb.EmbedInput)
S = TypeVar("S", pb.GenerateRequest, pb.EmbedRequest)
A = TypeVar("A", pb.UnloadAdapterRequest, pb.PinAdapterRequest, pb.UnpinAdapterRequest)


def generate_request(
    prompt: Prompt,
    *,
    adapter: str | AdapterReference | MergedAdapters | None = None,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    min_new_tokens: int = 0,
    grammar: Grammar | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    typical_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    seed: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    n: int = 1,
    logprobs: bool = False,
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
    prompt_top_logprobs: int = 0,
    request_id: str = "",
) -> pb.GenerateRequest:
    """The options are those of `GenerateOptions`."""
    sampling = _fill(
        pb.Sampling(),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
        logit_bias=logit_bias,
    )
    stopping = _fill(
        pb.Stopping(),
        max_new_tokens=max_new_tokens,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        min_new_tokens=min_new_tokens,
    )
    detail = _fill(
        pb.Detail(),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        prompt_top_logprobs=prompt_top_logprobs,
    )
    request = _fill(pb.GenerateRequest(sampling=sampling, stopping=stopping, detail=detail), request_id=request_id, n=n)
    if grammar is not None:
        request.grammar.CopyFrom(_grammar(grammar))
    _with_adapter(request, adapter)
    return _with_prompt(request, prompt)


def embed_request(
    inputs: str | Sequence[Prompt], adapter: str | AdapterReference | MergedAdapters | None
) -> pb.EmbedRequest:
    given = [inputs] if isinstance(inputs, str) else inputs
    request = pb.EmbedRequest(inputs=[_with_prompt(pb.EmbedInput(), prompt) for prompt in given])
    return _with_adapter(request, adapter)


def tokenize_request(prompt: str | Sequence[Message], skip_special_tokens: bool) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(skip_special_tokens=skip_special_tokens)
    return _fill(request, text=prompt) if isinstance(prompt, str) else _fill(request, chat=_chat(prompt))


def adapter_reference(adapter: str | AdapterReference) -> pb.AdapterReference:
    if isinstance(adapter, str):
        adapter = AdapterReference(adapter)
    return _fill(
        pb.AdapterReference(),
        id=adapter.id,
        source=adapter.source,
        revision=adapter.revision,
        token=adapter.token,
    )


def _with_prompt(request: R, prompt: Prompt) -> R:
    if isinstance(prompt, str):
        return _fill(request, text=prompt)
    if _is_chat(prompt):
        return _fill(request, chat=_chat(cast(Sequence[Message], prompt)))
    return _fill(request, token_ids=_fill(pb.TokenIds(), ids=prompt))


def name_adapter(request: A, reference: AdapterReference, digest: str) -> A:
    """With the reference or, if one is given, the digest. Raises InvalidRequestError for both, or neither."""
    if bool(reference.id) == bool(digest):
        raise InvalidRequestError(FieldViolation("digest", "give an id or a digest"))
    return _fill(request, digest=digest) if digest else _fill(request, adapter=adapter_reference(reference))


def _with_adapter(request: S, adapter: str | AdapterReference | MergedAdapters | None) -> S:
    if isinstance(adapter, MergedAdapters):
        return _fill(request, merged_adapters=_merged_adapters(adapter))
    return request if adapter is None else _fill(request, adapter=adapter_reference(adapter))


def _merged_adapters(merged: MergedAdapters) -> pb.MergedAdapters:
    return _fill(
        pb.MergedAdapters(),
        adapters=[adapter_reference(adapter) for adapter in merged.adapters],
        weights=merged.weights,
        strategy=merged.strategy,
        density=merged.density,
        majority_sign_method=merged.majority_sign_method,
    )


def cancel_request(request_id: str) -> pb.CancelGenerationRequest:
    return _fill(pb.CancelGenerationRequest(), request_id=request_id)


def _grammar(grammar: Grammar) -> pb.Grammar:
    try:
        return to_proto(grammar)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(FieldViolation("grammar", str(error))) from error


def _is_chat(prompt: Sequence[int] | Sequence[Message]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _chat(messages: Sequence[Message]) -> pb.Chat:
    return pb.Chat(messages=[_fill(pb.ChatMessage(), **message) for message in messages])


def _fill(proto: P, /, **values: object) -> P:
    """Sets the fields whose value is not None. One that does not fit is an InvalidRequestError that names it."""
    for name, value in values.items():
        if value is not None:
            try:
                proto.MergeFrom(type(proto)(**{name: value}))
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(FieldViolation(name, str(error))) from error
    return proto
