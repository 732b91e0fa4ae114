"""Prompts for what belongs between two texts, with the tokens that models for code have for it."""

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.chat import RenderedChat

FORMS = (  # before the first text, between the texts, behind the second
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen Coder, CodeGemma, Granite
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


async def encode_around(
    prompt: str | RenderedChat, suffix: str, tokenizer: Tokenizer, most: int | None, *, tenant: str = ""
) -> list[int]:
    """The tokens of a prompt for what belongs between the texts. A text gets the special tokens that the tokenizer adds
    before it. Stops reading a text once there are more than `most` tokens. Raises InvalidRequestError if the model has
    no tokens for it."""
    found = [[tokenizer.token_id(token) for token in form] for form in FORMS]
    tokens = next((form for form in found if None not in form), None)
    if tokens is None:
        reason = "needs a model whose tokenizer has tokens to fill in the middle, such as <|fim_prefix|>"
        raise InvalidRequestError(FieldViolation("suffix", reason))
    first, between, behind = (token for token in tokens if token is not None)
    text, added = (prompt.text, []) if isinstance(prompt, RenderedChat) else (prompt, tokenizer.added_before)
    before = await tokenizer.encode(RenderedChat(text), most, tenant=tenant)
    after = await tokenizer.encode(RenderedChat(suffix), most, tenant=tenant)
    return [*added, first, *before, between, *after, behind]
