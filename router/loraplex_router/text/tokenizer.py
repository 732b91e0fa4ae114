"""Text to token ids and back. Knows nothing of requests."""

import asyncio
from dataclasses import dataclass

import tokenizers

from loraplex_router.text.chat import ChatTemplate, Message

LONG_TEXT = 2000  # characters; tokenizing more than this would hold up other streams


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of an input text: characters [start, stop)."""

    id: int
    start: int
    stop: int


class Tokenizer:
    """The model's tokenizer and chat template.

    tokenizer_json: the content of a tokenizer.json, as the `tokenizers` library reads it.
    """

    def __init__(self, tokenizer_json: bytes, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._token_texts: dict[int, str] = {}
        self.chat_template = chat_template

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens of a text. Long texts are tokenized on a thread, without the interpreter's lock."""
        if len(text) < LONG_TEXT:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            batch = await asyncio.to_thread(self._tokenizer.encode_batch, [text], add_special_tokens=add_special_tokens)
            encoding = batch[0]
        return [TokenSpan(i, start, stop) for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)]

    async def encode_chat(self, messages: list[Message]) -> list[TokenSpan]:
        """The tokens of a conversation rendered with the model's chat template, up to where the answer begins.

        Raises InvalidRequestError if the template refuses the messages, or there is none.
        """
        return await self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: list[Message]) -> str:
        return ChatTemplate.require(self.chat_template).render(messages)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """One token as it stands in the vocabulary; special tokens are shown."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return text
