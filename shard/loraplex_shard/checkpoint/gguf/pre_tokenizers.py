"""How a text is split into words before byte-pair encoding, by llama.cpp's names for it (`tokenizer.ggml.pre`).

The expressions are those of the models' own tokenizer.json, which llama.cpp's llama-vocab.cpp quotes. It leaves out
that some tokenizers compose characters (NFC) first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}{1,3}"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA_3 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
QWEN_2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}"
QWEN_35 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SIGNS_AND_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_SIGNS_AND_PATHS}|{_BLANKS}"
GPT_4O = rf"{_CASED % (f'{_ENGLISH}?', f'{_ENGLISH}?')}|\p{{N}}{{1,3}}|{_SIGNS_AND_PATHS}|{_BLANKS}"
_HAN_AND_KANA = r"[一-龥぀-ゟ゠-ヿ]+"  # noqa: RUF001
DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
THREE_DIGITS = r"[0-9][0-9][0-9]"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
BAILING = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+"
SEED = rf"{_ENGLISH}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"


@dataclass(frozen=True, slots=True)
class Words:
    cuts: tuple[str, ...]  # regular expressions: each splits the text into its matches, and the next one splits these
    composes: bool = False  # the text is normalized to NFC first
    ignore_merges: bool = False  # a word that is a token becomes that token, even if merges do not lead to it
    add_bos: bool = False  # used if the file does not say


def _named(names: str, words: Words) -> Mapping[str, Words]:
    return dict.fromkeys(names.split(), words)


WORDS: Mapping[str, Words] = {
    **_named("gpt-2 phi-2 jais trillion granite-docling exaone4 gigachat mellum a.x-4.0 modern-bert", Words((GPT_2,))),
    **_named("olmo mpt", Words((GPT_2,), composes=True)),
    **_named("starcoder refact smollm codeshell exaone minerva-7b", Words((DIGIT, GPT_2))),
    **_named("command-r", Words((DIGIT, GPT_2), composes=True)),
    **_named(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Words((LLAMA_3,), ignore_merges=True, add_bos=True),
    ),
    **_named("dbrx smaug-bpe glm4 chatglm-bpe", Words((LLAMA_3,))),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez openpangu", Words((QWEN_2,), composes=True)),
    **_named("stablelm2 hunyuan solar-open grok-2", Words((QWEN_2,))),
    **_named("qwen35", Words((QWEN_35,), composes=True)),
    **_named("tekken", Words((TEKKEN,), ignore_merges=True, add_bos=True)),
    **_named("gpt-4o llama4 kanana2 minimax-m2", Words((GPT_4O,), ignore_merges=True)),
    **_named("deepseek-v3 hunyuan-dense joyai-llm", Words((DIGITS, _HAN_AND_KANA, DEEPSEEK_3))),
    **_named("deepseek-coder", Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", DIGIT))),
    **_named("falcon", Words((PUNCTUATION, GPT_2, THREE_DIGITS))),
    **_named("bailingmoe bailingmoe2 llada-moe", Words((BAILING,))),
    **_named("seed-coder", Words((SEED,))),
    **_named("bloom poro-chat gpt3-finnish", Words((BLOOM,))),
    **_named("viking", Words((BLOOM, DIGIT))),
    **_named("minicpm5", Words((DIGITS, LLAMA_3.replace("{1,3}", "+")))),
    # llama.cpp's default, for models that were added without a name of their own.
    **_named("default", Words((PUNCTUATION.replace("`", ""), GPT_2, r"\p{N}+", THREE_DIGITS))),
}
