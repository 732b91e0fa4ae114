"""Token ids to text, one token at a time, whole characters only."""

from typing import Protocol

CONTEXT = 6  # prompt tokens before the first output: some tokenizers drop a leading space without them
CHARACTER_TOKENS = 4  # maximum number of tokens per UTF-8 character: one per byte
INCOMPLETE = "\ufffd"  # shown by decoders for bytes that are not (yet) a character


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...

    def token_text(self, token: int) -> str:
        """The text of one token within a text; a part of a character is shown as U+FFFD."""
        ...

    def hidden_text(self, token: int) -> str:
        """The vocabulary's text for a token that `decode` omits; empty for others."""
        ...


def own_length(text: str, token_text: str) -> int:
    """How many characters of the text that a token completes are its own: all, unless it shows that the bytes before it
    never form a character."""
    return len(token_text) if text.endswith(token_text) and INCOMPLETE not in token_text else len(text)


class Detokenizer:
    """The text of a growing sequence of tokens.

    A token's text can depend on the tokens before it, so a window is decoded with and without the new tokens, and the
    difference is the new text. The window begins at the end of the last but one piece of text.
    """

    def __init__(self, decoder: Decoder, prompt: list[int]) -> None:
        self._decoder = decoder
        self._window = prompt[-CONTEXT:]
        self._settle()
        if self._text.endswith(INCOMPLETE):
            self._window = []
            self._settle()

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decoder.decode(self._window)
        pending = len(self._window) - self._settled
        if text.endswith(INCOMPLETE) and pending < CHARACTER_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The rest at the end: an incomplete character, shown as U+FFFD."""
        if len(self._window) == self._settled:
            return ""
        return self._advance(self._decoder.decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._text) :]
        del self._window[: self._settled]
        self._settle()
        return new

    def _settle(self) -> None:
        self._settled = len(self._window)  # tokens of the window whose text was returned
        self._text = self._decoder.decode(self._window)
