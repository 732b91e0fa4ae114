"""Between generation.proto and the router's own types."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.calls import AnswerReader
from loraplex_router.api.chats import read_chat, read_parts, read_tool_choice, separates
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.output import SequenceOutput
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.chat import Chat
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, asked_of
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Alternatives, Detail, Sample


def read_request(message: pb.GenerateRequest) -> Request:
    """Raises InvalidRequestError if there is no prompt; everything else is checked by the service."""
    sampling = {field.name: value for field, value in message.sampling.ListFields()}
    sampling["logit_bias"] = dict(message.sampling.logit_bias)
    stopping, prompt = message.stopping, read_prompt(message)
    grammar = _read_grammar(message.grammar) if message.HasField("grammar") else None
    if message.HasField("tool_choice"):
        grammar = read_tool_choice(message) or grammar
    if message.tool_choice.mode == pb.ToolChoice.MODE_NONE and isinstance(prompt, Chat):
        prompt = replace(prompt, tools=())
    return Request(
        prompt=prompt,
        request_id=message.request_id,
        adapter=read_adapter(message),
        adapters=tuple(read_reference(each) if each.ByteSize() else None for each in message.adapters),
        sampling=Sampling(**sampling),
        max_new_tokens=stopping.max_new_tokens if stopping.HasField("max_new_tokens") else None,
        min_new_tokens=stopping.min_new_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        n=message.n or 1,
        detail=Detail(
            logprobs=message.detail.logprobs or message.detail.top_logprobs > 0,
            top_logprobs=message.detail.top_logprobs,
            prompt_logprobs=message.detail.prompt_logprobs or message.detail.prompt_top_logprobs > 0,
            prompt_top_logprobs=message.detail.prompt_top_logprobs,
        ),
        grammar=grammar,
        separates_thoughts=separates(message),
        background=message.background,
        cache_salt=message.cache_salt,
        session=message.session,
    )


def read_prompt(message: pb.GenerateRequest | pb.EmbedInput) -> str | Chat | tuple[int, ...]:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "chat":
            return read_chat(message.chat)
        case _:
            raise InvalidRequestError(FieldViolation("prompt", "set text, token_ids or chat"))


def _read_grammar(message: pb.Grammar) -> Grammar:
    match message.WhichOneof("kind"):
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, message.json_schema)
        case "json_object":
            return Grammar.json_object()
        case "regex":
            return Grammar(GrammarKind.REGEX, message.regex)
        case "choice":
            return Grammar.choice(message.choice.texts)
        case "lark":
            return Grammar(GrammarKind.LARK, message.lark)
        case _:
            raise InvalidRequestError(FieldViolation("grammar", "set json_schema, json_object, regex, choice or lark"))


def read_reference(reference: pb.AdapterReference) -> AdapterReference:
    return AdapterReference(reference.id, reference.source, reference.revision, reference.token)


def read_targets(targets: Iterable[pb.AliasTarget]) -> dict[str, float]:
    return {target.adapter: target.percent for target in targets}


def read_adapter(
    message: pb.GenerateRequest | pb.EmbedRequest | pb.ClassifyRequest,
) -> AdapterReference | MergedReference | None:
    match message.WhichOneof("weights"):
        case "adapter":
            return read_reference(message.adapter)
        case "merged_adapters":
            merged = message.merged_adapters
            return MergedReference(
                adapters=tuple(map(read_reference, merged.adapters)),
                weights=tuple(merged.weights),
                strategy=merged.strategy or "linear",
                density=merged.density if merged.HasField("density") else 1.0,
                majority_sign_method=merged.majority_sign_method or "total",
            )
        case _:
            return None


class Writer:
    """Writes the answers of a request's generations, whose sequences are numbered through."""

    def __init__(
        self,
        generations: Sequence[Generation],
        tokenizer_of: Callable[[Adapter], Tokenizer],
        reader_of: Callable[[SequenceOutput], AnswerReader | None],
    ) -> None:
        self._answers = [(generation, output) for generation in generations for output in generation.outputs]
        self._tokenizer_of = tokenizer_of
        self._readers = [reader_of(output) for _, output in self._answers]
        self._begun: set[int] = set()  # indexes of sequences that something was written of

    def num_logprobs(self, index: int, delta: Delta) -> int:
        """In the next event."""
        prompt = 0 if self._begun else self._answers[0][1].num_prompt_logprobs
        return prompt + delta.num_logprobs

    def event(self, index: int, delta: Delta) -> pb.GenerateStreamResponse:
        generation, output = self._answers[index]
        parts = read_parts(self._readers[index], delta, output.new_id)
        event = pb.GenerateStreamResponse(
            request_id=generation.request_id,
            index=index,
            text=parts.text,
            reasoning=parts.reasoning,
            tool_calls=parts.calls,
            adapter=_adapter(generation),
        )
        self._write_tokens(generation, delta.samples, event)
        if index not in self._begun:
            self._begun.add(index)
            event.adapter_digest = generation.adapter_digest
            event.adapter_version = generation.adapter_version
            event.warnings.extend(generation.warnings)
            if index == 0:
                event.prompt.extend(self._prompt())
        if delta.finish_reason:
            event.finish_reason = _finish_reason(delta)
            event.usage.CopyFrom(_usage(output))
            if (seed := output.seed) is not None:
                event.seed = seed
        return event

    def response(self, deltas: Iterable[Delta]) -> pb.GenerateResponse:
        """The whole answer, from one delta per sequence."""
        first, _ = self._answers[0]
        return pb.GenerateResponse(
            request_id=first.request_id,
            sequences=map(self._sequence, self._answers, self._readers, deltas),
            prompt=self._prompt(),
            adapter_digest=first.adapter_digest,
            adapter_version=first.adapter_version,
            warnings=dict.fromkeys(warning for generation, _ in self._answers for warning in generation.warnings),
        )

    def _sequence(
        self, answer: tuple[Generation, SequenceOutput], reader: AnswerReader | None, delta: Delta
    ) -> pb.GeneratedSequence:
        generation, output = answer
        parts = read_parts(reader, delta, output.new_id)
        sequence = pb.GeneratedSequence(
            text=parts.text,
            reasoning=parts.reasoning,
            tool_calls=[part.call for part in parts.calls],
            finish_reason=_finish_reason(delta),
            usage=_usage(output),
            seed=output.seed,
            adapter=_adapter(generation),
            adapter_digest=generation.adapter_digest,
            adapter_version=generation.adapter_version,
        )
        self._write_tokens(generation, delta.samples, sequence)
        return sequence

    def _write_tokens(
        self,
        generation: Generation,
        samples: Iterable[Sample],
        to: pb.GenerateStreamResponse | pb.GeneratedSequence,
    ) -> None:
        tokenizer = self._tokenizer_of(generation.adapter)
        text, partial = tokenizer.token_text, tokenizer.partial_bytes
        for sample in samples:
            token = to.tokens.add(id=sample.token, text=text(sample.token), partial=partial(sample.token))
            if sample.logprob is not None:
                token.logprob = sample.logprob
            token.alternatives.extend(_alternatives(tokenizer, sample.alternatives))

    def _prompt(self) -> list[pb.PromptToken]:
        """The prompt's tokens with their logprobs; none if not asked for, or cancelled before they were known."""
        generation, output = self._answers[0]
        sequence = output.sequence
        if not sequence.detail.prompt_logprobs or len(output.prompt_logprobs) < sequence.prompt_length - 1:
            return []
        tokens = sequence.tokens[: sequence.prompt_length]
        tokenizer = self._tokenizer_of(generation.adapter)
        text, partial = tokenizer.token_text, tokenizer.partial_bytes
        scored = zip(tokens, [None, *output.prompt_logprobs], [(), *output.prompt_alternatives], strict=True)
        return [
            pb.PromptToken(
                id=token,
                text=text(token),
                partial=partial(token),
                logprob=logprob,
                alternatives=_alternatives(tokenizer, alternatives),
            )
            for token, logprob, alternatives in scored
        ]


def _alternatives(tokenizer: Tokenizer, alternatives: Alternatives) -> Iterator[pb.TokenLogprob]:
    text, partial = tokenizer.token_text, tokenizer.partial_bytes
    return (
        pb.TokenLogprob(id=token, text=text(token), logprob=logprob, partial=partial(token))
        for token, logprob in alternatives
    )


def _adapter(generation: Generation) -> str:
    return ",".join(asked_of(generation.reference))


def _finish_reason(delta: Delta) -> pb.FinishReason.ValueType:
    assert delta.finish_reason is not None
    return pb.FinishReason.ValueType(delta.finish_reason.value)


def _usage(output: SequenceOutput) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=output.sequence.prompt_length,
        cached_tokens=output.sequence.prefix_hit,
        generated_tokens=output.generated,
    )


def read_adapter_name(
    request: pb.UnloadAdapterRequest | pb.PinAdapterRequest | pb.UnpinAdapterRequest,
) -> AdapterReference | str:
    """A reference or a digest. Raises InvalidRequestError if it is both."""
    if request.digest and request.HasField("adapter"):
        raise InvalidRequestError(FieldViolation("digest", "give the digest or the adapter, not both"))
    return request.digest or read_reference(request.adapter)
