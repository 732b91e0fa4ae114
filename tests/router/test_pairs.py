"""Pairs of texts as tokens: as the `tokenizers` library makes them, however they are cut."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.chat import ChatTemplates, TextPair

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
SPECIAL = "<s>", "</s>"
TEMPLATES = {
    "as BERT": ("<s> $A </s>", "<s> $A </s> $B </s>"),
    "as Llama": ("<s> $A", "<s> $A <s> $B"),
    "none": None,
}
TEXTS = st.text("ab é€", max_size=12)


def library(template: tuple[str, str] | None) -> tokenizers.Tokenizer:
    """One token per byte."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([*SPECIAL])
    if template is not None:
        special = [(token, made.token_to_id(token)) for token in SPECIAL]
        made.post_processor = TemplateProcessing(single=template[0], pair=template[1], special_tokens=special)
    return made


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(query=TEXTS, document=TEXTS, kept=st.integers(4, 30))
async def test_a_pair_has_the_library_s_tokens_however_many_are_kept(
    template: tuple[str, str] | None, query: str, document: str, kept: int
) -> None:
    oracle = library(template)
    ours = Tokenizer(oracle.to_str().encode())
    assert await ours.encode_pair(TextPair(query, document)) == oracle.encode(query, document).ids
    oracle.enable_truncation(kept, strategy="longest_first")
    assert await ours.encode_pair(TextPair(query, document), last=kept) == oracle.encode(query, document).ids


async def test_long_texts_are_read_piece_by_piece_and_no_further_than_needed() -> None:
    oracle = library(TEMPLATES["as BERT"])
    ours, long = Tokenizer(oracle.to_str().encode()), "a long text. " * 500
    assert await ours.encode_pair(TextPair("query", long)) == oracle.encode("query", long).ids
    assert 100 < len(await ours.encode_pair(TextPair("query", long * 100), most=100)) < len(long) * 50


async def test_each_text_may_have_a_limit_of_its_own() -> None:
    ours, oracle = Tokenizer(library(TEMPLATES["as BERT"]).to_str().encode()), library(TEMPLATES["as BERT"])
    found = await ours.encode_pair(TextPair("query", "document", max_query=2, max_document=3))
    assert found == oracle.encode("qu", "doc").ids


async def test_some_models_read_a_pair_as_one_text() -> None:
    oracle = library(TEMPLATES["as BERT"])
    ours = Tokenizer(oracle.to_str().encode())
    assert await ours.encode_pair(TextPair("query", "document", joined=True)) == oracle.encode("querydocument").ids
    cut = await ours.encode_pair(TextPair("query", "document", max_document=3, joined=True))
    assert cut == oracle.encode("querydoc", add_special_tokens=False).ids


@pytest.mark.parametrize(("most", "expected"), [(1, "a"), (2, "aé"), (3, "aé"), (4, "aéb"), (9, "aéb")])
async def test_a_text_s_beginning_ends_with_a_token(most: int, expected: str) -> None:
    ours = Tokenizer(library(None).to_str().encode())
    assert await ours.beginning("aéb", most) == expected


@pytest.mark.parametrize(
    ("template", "takes_pairs"),
    [
        (
            "{{ messages | selectattr('role', 'eq', 'query') }}{{ messages | selectattr('role', 'eq', 'document') }}",
            True,
        ),
        ('{% if m.role == "query" %}{% elif m.role == "document" %}{% endif %}', True),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", False),
        ("{{ documents }}{{ query }}", False),
    ],
)
def test_a_template_for_pairs_is_one_that_names_both_roles(template: str, takes_pairs: bool) -> None:
    assert ChatTemplates({"default": template}).takes_pairs is takes_pairs
    assert not ChatTemplates({"other": template}).takes_pairs
