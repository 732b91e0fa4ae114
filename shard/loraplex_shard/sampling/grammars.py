"""Compiles grammars against the model's tokenizer, with llguidance; compiled ones are kept.

Safe to call from any thread. Knows nothing of sequences or steps.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import MAX_QUOTED, FieldViolation, InvalidRequestError
from loraplex_shard.sampling.grammar_texts import to_lark
from loraplex_shard.sampling.json_schemas import read_schema
from loraplex_shard.sampling.relaxed_schemas import relax
from loraplex_shard.sampling.schema_tree import Schema
from loraplex_shard.sampling.thoughts import after_thoughts
from loraplex_shard.sampling.vocabulary import truncate_tokenizer

LEXER_FUEL = 50_000  # states made anew in one step, which all streams wait for: some 50 ms, and 40 MB
KEPT = 256  # compiled grammars
KEPT_TOKENIZERS = 8  # of adapters
Vocabularies = Callable[[str], tuple[bytes, int, tuple[int, ...]] | None]

# As json.dumps writes: models have seen much of it, and it leaves nothing to choose between values. oneOf is taken for
# anyOf: that only one of its parts fits cannot be told while a document is written.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


class GrammarCompiler:
    """For one model. The tokenizer is read when the first grammar comes, for few models are asked for one at once."""

    def __init__(
        self,
        tokenizer_json: bytes,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        vocabulary: Vocabularies = lambda digest: None,
    ) -> None:
        """tokenizer_json as the `tokenizers` library reads it; end_token_ids, in ascending order, end an answer where a
        match may end. `vocabulary` returns an adapter's own tokenizer.json (empty: the model's), how many tokens it has
        (0: as many as the model) and its end tokens, given its digest; None: there is no such adapter."""
        self._tokenizer_json = tokenizer_json
        self.vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._vocabulary = vocabulary
        self._compile = lru_cache(KEPT)(self._compile_anew)
        self._of_adapters = lru_cache(KEPT_TOKENIZERS)(GrammarCompiler)

    def of(self, adapter: str) -> "GrammarCompiler":
        """The compiler for an adapter with tokens of its own, given by its digest; empty: for the model. Raises
        InvalidRequestError if there is no such adapter."""
        if not adapter:
            return self
        found = self._vocabulary(adapter)
        if found is None:
            raise InvalidRequestError(FieldViolation("grammar", "its adapter is not loaded any more: try again"))
        tokenizer_json, vocab_size, ends = found
        return self._of_adapters(
            tokenizer_json or self._tokenizer_json,
            vocab_size or self.vocab_size,
            tuple(sorted({*self._end_token_ids, *ends})),
        )

    @property
    def end_token_id(self) -> int:
        """What ends an answer that cannot go on."""
        return self._end_token_ids[0]

    def matcher(self, grammar: pb.Grammar) -> LLMatcher:
        """A matcher at the beginning of an answer, the caller's own.

        Raises InvalidRequestError with the reason if the grammar cannot be compiled.
        """
        return self._compiled(grammar).matcher.deep_copy()

    def unenforced(self, grammar: pb.Grammar) -> list[pb.UnenforcedSchema]:
        """Its schemas that are compiled without some of their keywords. Raises as `matcher` does."""
        return list(self._compiled(grammar).unenforced)

    def _compiled(self, grammar: pb.Grammar) -> "_Compiled":
        thoughts = grammar.thoughts.SerializeToString(deterministic=True)
        return self._compile(grammar.kind, grammar.text, tuple(grammar.schemas), thoughts)

    def fast_forward(self, matcher: LLMatcher) -> list[int]:
        """The tokens that can only follow. llguidance's tokenizer takes a text that reads like a special token for one:
        where the grammar means the text, it is spelled out."""
        tokens = matcher.compute_ff_tokens()
        valid = matcher.validate_tokens(tokens) if tokens else 0
        return tokens[:valid] + [part for token in tokens[valid:] for part in self._spelled(token)]

    def _spelled(self, token: int) -> list[int]:
        tokenizer = self._tokenizer
        if not tokenizer.is_special_token(token):
            return [token]
        return tokenizer.greedy_tokenize(tokenizer.decode_str([token]))

    def _compile_anew(
        self, kind: pb.GrammarKind.ValueType, text: str, schemas: tuple[str, ...], thoughts: bytes
    ) -> "_Compiled":
        """`thoughts`: the message, if they may come first."""
        answer = self._compile_answer(kind, text, schemas)
        if not thoughts:
            return answer
        named = (
            {"json_schema": json.loads(answer.text)}
            if kind == pb.GRAMMAR_KIND_JSON_SCHEMA
            else {"lark_grammar": answer.text}
        )
        write = partial(after_thoughts, named, pb.Thoughts.FromString(thoughts), self._tokenizer)
        return answer._replace(matcher=self._compile_field("grammar", write))

    def _compile_answer(self, kind: pb.GrammarKind.ValueType, text: str, schemas: tuple[str, ...]) -> "_Compiled":
        if kind == pb.GRAMMAR_KIND_JSON_SCHEMA:
            return self._compile_schema("grammar", text)
        parts = [self._compile_schema(f"grammar.schemas[{place}]", schema) for place, schema in enumerate(schemas)]
        write = partial(_to_llguidance, kind, text, [part.text for part in parts])
        matcher = self._compile_field("grammar", write)
        return _Compiled(matcher, write(), tuple(found for part in parts for found in part.unenforced))

    def _compile_schema(self, field: str, text: str) -> "_Compiled":
        """Without the keywords that cannot be enforced, if any."""
        try:
            schema = read_schema(text)
        except (ValueError, RecursionError) as error:
            raise _refusal(field, str(error)) from error
        try:
            return _Compiled(self._compile_field(field, lambda: _schema_grammar(schema)), _schema_text(schema))
        except InvalidRequestError:
            relaxed, left_out = relax(schema, self._compiles)
            if relaxed == schema:
                raise
        unenforced = (pb.UnenforcedSchema(field=field, keywords=left_out),) if left_out else ()
        matcher = self._compile_field(field, lambda: _schema_grammar(relaxed))
        return _Compiled(matcher, _schema_text(relaxed), unenforced)

    def _compiles(self, pattern: str) -> bool:
        """Whether an expression in a JSON schema can be compiled."""
        try:
            self._compile_field("", lambda: _schema_grammar({"type": "string", "pattern": pattern}))
        except InvalidRequestError:
            return False
        return True

    def _compile_field(self, field: str, write: Callable[[], str]) -> LLMatcher:
        try:
            limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=LEXER_FUEL, step_lexer_fuel=LEXER_FUEL)
            matcher = LLMatcher(self._tokenizer, write(), log_level=0, limits=limits)
        except Exception as error:  # llguidance has no exception class of its own
            raise _refusal(field, str(error)) from error
        if matcher.is_error():
            raise _refusal(field, matcher.get_error())
        trial = matcher.deep_copy()
        if not any(trial.compute_bitmask()) or trial.is_error():
            raise _refusal(field, "nothing matches it")
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        tokenizer_json, size = truncate_tokenizer(self._tokenizer_json, self.vocab_size)
        ends = [token for token in self._end_token_ids if token < size]
        if not ends:
            raise ValueError("this model has no end token, so an answer could not end")
        return LLTokenizer(tokenizer_json, self.vocab_size, ends)


class _Compiled(NamedTuple):
    matcher: LLMatcher
    text: str  # as it was compiled: a JSON schema or a Lark grammar
    unenforced: tuple[pb.UnenforcedSchema, ...] = ()


def _to_llguidance(kind: pb.GrammarKind.ValueType, text: str, schemas: Sequence[str]) -> str:
    if kind == pb.GRAMMAR_KIND_REGEX:
        # \d is [0-9]: other scripts' digits match in Rust, but nobody who writes it means them.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, use_ascii='d')}/")
    rules = [f"schema_{place}: %json {schema}" for place, schema in enumerate(schemas)]
    return LLMatcher.grammar_from_lark("\n".join([to_lark(text), *rules]))


def _schema_grammar(schema: Schema) -> str:
    return LLMatcher.grammar_from_json_schema(_schema_text(schema))


def _schema_text(schema: Schema) -> str:
    return json.dumps({"x-guidance": WRITTEN, **schema}, ensure_ascii=False)


def _refusal(field: str, reason: str) -> InvalidRequestError:
    """The reason may quote the grammar."""
    return InvalidRequestError(FieldViolation(field, f"cannot be compiled: {reason.strip()[:MAX_QUOTED]}"))
