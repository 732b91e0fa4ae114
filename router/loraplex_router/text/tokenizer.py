"""Text to token ids and back. Knows nothing of requests."""

import asyncio
from dataclasses import dataclass
from functools import partial

import tokenizers

from loraplex_router.text.chat import Chat, ChatTemplate, RenderedChat
from loraplex_router.text.detokenizer import Decoder

LONG_TEXT = 2000  # characters; tokenizing more than this would hold up other streams


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of an input text, and the part of the text that became it: characters [start, stop)."""

    id: int
    text: str
    start: int
    stop: int


class _Verbatim:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def hidden_text(self, token: int) -> str:
        return ""


class Tokenizer:
    """The model's tokenizer and chat template.

    tokenizer_json: the content of a tokenizer.json, as the `tokenizers` library reads it.
    """

    def __init__(self, tokenizer_json: bytes, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._token_texts: dict[int, str] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_tokens = frozenset(token for token, added_token in added.items() if added_token.special)
        self.chat_template = chat_template

    async def encode(self, prompt: str | Chat | RenderedChat) -> list[int]:
        """The tokens of a text, or of a conversation rendered up to where the answer begins. A text gets the special
        tokens that the tokenizer adds (a BOS for example); a chat template writes its own.

        Raises InvalidRequestError if the chat template refuses the messages, or the model has none.
        """
        ids: list[int] = (await self._encode(self.render(prompt), isinstance(prompt, str))).ids
        return ids

    async def spans(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens of a text, each with its place in it."""
        encoding = await self._encode(text, add_special_tokens)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [TokenSpan(token, text[start:stop], start, stop) for token, (start, stop) in places]

    def render(self, prompt: str | Chat | RenderedChat) -> str:
        """The text that is tokenized. Raises InvalidRequestError as `encode` does."""
        match prompt:
            case Chat():
                return ChatTemplate.require(self.chat_template).render(prompt)
            case RenderedChat():
                return prompt.text
            case _:
                return prompt

    async def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        """Long texts are tokenized on a thread, without the interpreter's lock."""
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        encode = partial(self._tokenizer.encode_batch, add_special_tokens=add_special_tokens)
        return (await asyncio.to_thread(encode, [text]))[0]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def hidden_text(self, token: int) -> str:
        """The text of a special token; empty for others."""
        return self.token_text(token) if token in self._special_tokens else ""

    @property
    def verbatim(self) -> Decoder:
        """Decodes with the special tokens shown."""
        return _Verbatim(self._tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether the token is left out of the text."""
        return token in self._special_tokens

    def token_text(self, token: int) -> str:
        """One token as it stands in the vocabulary; special tokens are shown."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return text
