"""Text to token ids and back. Independent of requests."""

import asyncio
from array import array
from codecs import getincrementaldecoder
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TypeVar

import tokenizers

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.fair_slots import FairSlots
from loraplex_router.text.detokenizer import INCOMPLETE, Decoder, own_length
from loraplex_router.text.pieces import LARGEST, IndivisibleError, Piece, read_pieces
from loraplex_router.text.token_bytes import TokenBytes
from loraplex_router.vocabulary.chat import RenderedChat, TextPair

LONG_TEXT = 2000  # characters; tokenizing more than this at once would delay other streams
MANY_TOKENS = 2000  # decoding more than this at once would also delay them

T = TypeVar("T")

_THREADS = ThreadPoolExecutor(2, "tokenizer")  # for long texts: one piece of each in turn
_TURNS = FairSlots(4)  # for these threads: however much a tenant sends, few pieces go before another one's


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token of an input text, with its characters [start, stop)."""

    id: int
    text: str
    start: int
    stop: int


class Spans:
    """The tokens of a text, each with its position. A token takes 12 bytes."""

    def __init__(self, text: str) -> None:
        self.ids = array("I")
        self._text = text
        self._places: list[tuple[int, array[int]]] = []  # of each piece: see Piece

    def add(self, piece: Piece) -> None:
        self.ids.fromlist(piece.ids)
        self._places.append((piece.begin, piece.flat_places()))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[TokenSpan]:
        ids = iter(self.ids)
        for begin, places in self._places:
            for start, stop in zip(places[::2], places[1::2], strict=True):
                first, behind = begin + start, begin + stop
                yield TokenSpan(next(ids), self._text[first:behind], first, behind)


class Tokenizer:
    """The model's tokenizer.

    tokenizer_json: the content of a tokenizer.json, as the `tokenizers` library reads it. Where a `tenant` can be
    named, it is the one whose long text takes turns with those of others.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bytes = TokenBytes(self._tokenizer)
        self._texts: dict[int, str] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_tokens = frozenset(token for token, added_token in added.items() if added_token.special)

    async def encode(
        self, prompt: str | RenderedChat, most: int | None = None, last: int | None = None, *, tenant: str = ""
    ) -> list[int]:
        """The tokens of a text or a rendered conversation. A text gets the special tokens that the tokenizer adds (a
        BOS for example); a chat template writes its own. Stops reading once there are more than `most` tokens. With
        `last`, returns only the last `last` tokens."""
        text, add_special_tokens = (prompt, True) if isinstance(prompt, str) else (prompt.text, False)
        ids = array("I")
        if len(text) < LONG_TEXT:
            ids.fromlist(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        else:
            async for piece in self._read(text, add_special_tokens, tenant):
                ids.fromlist(piece.ids)
                if most is not None and len(ids) > most:
                    break
        return (ids if last is None else ids[-last:]).tolist()

    async def encode_pair(
        self, pair: TextPair, most: int | None = None, last: int | None = None, *, tenant: str = ""
    ) -> list[int]:
        """The tokens of a pair, with the special tokens that the tokenizer adds to pairs. Stops reading a text once
        there are more than `most` tokens. If there are more than `last`, the longer text or both are cut at the end, as
        in transformers."""
        if pair.joined and not (pair.max_query or pair.max_document):
            return (await self.encode(pair.query + pair.document, most, tenant=tenant))[:last]
        query = (await self.encode(RenderedChat(pair.query), most, tenant=tenant))[: pair.max_query or None]
        document = (await self.encode(RenderedChat(pair.document), most, tenant=tenant))[: pair.max_document or None]
        before, between, behind = ([], [], []) if pair.joined else self._added_to_pair
        if last is not None:
            room = max(0, last - len(before) - len(between) - len(behind))
            kept_of_query, kept_of_document = _longest_first(len(query), len(document), room)
            query, document = query[:kept_of_query], document[:kept_of_document]
        return [*before, *query, *between, *document, *behind]

    async def spellings(self, words: Sequence[str], *, tenant: str = "") -> list[list[int]]:
        """The words' tokens: of each where it begins a text and, if these are as many, where a space is before it, as
        vLLM has bad words."""
        if not words:
            return []
        texts = [space + word.lstrip() for word in words for space in ("", " ")]
        encode = partial(self._tokenizer.encode_batch, texts, add_special_tokens=False)
        encoded = await _on_thread(encode, tenant)
        found = list[list[int]]()
        for plain, spaced in zip(encoded[::2], encoded[1::2], strict=True):
            differs = spaced.ids[:1] != plain.ids[:1] and len(spaced.ids) == len(plain.ids)
            found += [tokens for tokens in ((plain.ids, spaced.ids) if differs else (plain.ids,)) if tokens]
        return found

    async def beginning(self, text: str, most: int, *, tenant: str = "") -> str:
        """The text up to the end of its first `most` tokens."""
        spans = await self.spans(text, add_special_tokens=False, tenant=tenant)
        return text if len(spans) <= most else text[: next(islice(spans, most - 1, None)).stop]

    async def spans(self, text: str, add_special_tokens: bool = True, *, tenant: str = "") -> Spans:
        """The tokens of a text, each with its position."""
        spans = Spans(text)
        async for piece in self._read(text, add_special_tokens, tenant):
            spans.add(piece)
        return spans

    async def _read(self, text: str, add_special_tokens: bool, tenant: str) -> AsyncIterator[Piece]:
        """A text's pieces, each tokenized on a thread."""
        before, behind = self._added if add_special_tokens else ([], [])
        yield _nowhere(before)
        pieces = read_pieces(self._tokenizer, text)
        try:
            while piece := await _on_thread(partial(next, pieces, None), tenant):
                yield piece
        except IndivisibleError:
            reason = f"has {LARGEST} characters in a row that cannot be tokenized apart from each other"
            raise InvalidRequestError(FieldViolation("prompt", reason)) from None
        yield _nowhere(behind)

    @cached_property
    def _added_to_pair(self) -> tuple[list[int], list[int], list[int]]:
        """The special tokens that the tokenizer adds before, between and behind the texts of a pair."""
        encoding = self._tokenizer.encode("a", "a", add_special_tokens=True)
        ids: list[int] = encoding.ids
        first, second = ([at for at, text in enumerate(encoding.sequence_ids) if text == part] for part in (0, 1))
        return ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after a text."""
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        ids: list[int] = encoding.ids
        inner = [at for at, special in enumerate(encoding.special_tokens_mask) if not special]
        return (ids[: inner[0]], ids[inner[-1] + 1 :]) if inner else (ids, [])

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def hidden_text(self, token: int) -> str:
        """The text of a special token; empty for others."""
        return self.token_text(token) if token in self._special_tokens else ""

    async def decode_verbatim(self, ids: list[int], *, tenant: str = "") -> str:
        """The text of any number of token ids, with special tokens."""
        if len(ids) < MANY_TOKENS:
            return self.verbatim.decode(ids)
        decode = partial(self._tokenizer.decode_batch, skip_special_tokens=False)
        (text,) = await _on_thread(partial(decode, [ids]), tenant)
        return str(text)

    @property
    def verbatim(self) -> Decoder:
        """Decodes with special tokens."""
        return _Verbatim(self._tokenizer, self.token_text)

    def showing(self, tags: str) -> Decoder:
        """Decodes with the special tokens that are in this text, and without the others."""
        shown = self._special_tokens.intersection(self._tokenizer.encode(tags, add_special_tokens=False).ids)
        if not shown:
            return self
        return _Verbatim(self._tokenizer, self.token_text, self._special_tokens - shown)

    def special_token_at(self, text: str) -> int | None:
        """The special token that a short text begins with, apart from white space."""
        first = self._tokenizer.encode(text.lstrip(), add_special_tokens=False).ids[:1]
        return first[0] if first and first[0] in self._special_tokens else None

    def token_id(self, text: str) -> int | None:
        """The token that is written so in the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    @property
    def added_before(self) -> list[int]:
        """The special tokens that the tokenizer adds before a text."""
        return self._added[0]

    def is_special(self, token: int) -> bool:
        """Whether the token is omitted from the text."""
        return token in self._special_tokens

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes within a text; special tokens are included."""
        return self._bytes.of(token)

    def token_text(self, token: int) -> str:
        """The same as text; a part of a character is shown as U+FFFD."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._bytes.of(token).decode(errors="replace")
        return text

    def partial_bytes(self, token: int) -> bytes:
        """The bytes of a token that begins or ends within a character; none for other tokens."""
        text = self.token_text(token)
        return self._bytes.of(token) if INCOMPLETE in text and text.encode() != self._bytes.of(token) else b""

    def token_texts(self, tokens: Sequence[int], show_special_tokens: bool) -> list[str]:
        """The text that each token adds, from the text's beginning on. If several tokens form a character, the last one
        has it."""
        decode = getincrementaldecoder("utf-8")("replace").decode
        hidden = frozenset[int]() if show_special_tokens else self._special_tokens
        texts = list[str]()
        for token in tokens:
            text = "" if token in hidden else decode(self._bytes.of(token))
            if before := len(text) - own_length(text, self.token_text(token)):  # bytes that never became a character
                texts[-1] += text[:before]
            texts.append(text[before:])
        if texts:
            texts[-1] += decode(b"", final=True)
        whole = self._tokenizer.decode(list(tokens), skip_special_tokens=not show_special_tokens)
        if "".join(texts) == " " + whole:  # many decoders drop a text's first space
            first = next(place for place, text in enumerate(texts) if text)
            texts[first] = texts[first][1:]
        return texts


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text are kept, by the rule of the `tokenizers` library: the longer text is cut to what
    the other leaves or, if that is less than half of the room, both are cut to half."""
    if first + second <= room:
        return first, second
    shorter, longer = min(first, second), max(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)


class _Verbatim:
    """Decodes with all special tokens but those that are hidden."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        token_text: Callable[[int], str],
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self.token_text = token_text

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([id for id in ids if id not in self._hidden], skip_special_tokens=False)

    def hidden_text(self, token: int) -> str:
        return self.token_text(token) if token in self._hidden else ""


async def _on_thread(work: Callable[[], T], tenant: str) -> T:
    """Does it on a thread, without the interpreter's lock, when it is the tenant's turn."""
    async with _TURNS.taken(tenant):
        return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


def _nowhere(ids: list[int]) -> Piece:
    """The tokens that represent no part of the text."""
    return Piece(0, ids, [(0, 0)] * len(ids))
