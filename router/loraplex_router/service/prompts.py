"""Prompts as tokens, and the tokens that end an answer to them."""

from typing import TypeAlias

from loraplex_router.access.tenant import Tenant
from loraplex_router.text.fill_in_middle import encode_around
from loraplex_router.text.model import Model
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.chat import RenderedChat, TextPair
from loraplex_router.vocabulary.context_length import count_kept, max_counted
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Sequence

Text: TypeAlias = str | tuple[int, ...] | RenderedChat | TextPair  # the input of the tokenizer, or token ids


async def encode(request: Request, text: Text, model: Model, tokenizer: Tokenizer, tenant: Tenant) -> list[int]:
    """The request's prompt in tokens, truncated as the request asks. Of a text that is far too long, only enough tokens
    to show that."""
    kept = count_kept(request, model.info.max_model_len)
    if isinstance(text, tuple):
        return list(text if kept is None else text[-kept:])
    most = None if kept else max_counted(model.info.max_model_len)
    if request.suffix and not isinstance(text, TextPair):
        return await encode_around(text, request.suffix, tokenizer, most, tenant=tenant.name)
    if isinstance(text, TextPair):
        return await tokenizer.encode_pair(text, most, kept, tenant=tenant.name)
    return await tokenizer.encode(text, most, kept, tenant=tenant.name)


def make_sequences(
    request: Request,
    arrivals: int,
    prompt: list[int],
    room: int,
    text: Text,
    adapter: Adapter,
    tenant: Tenant,
    model: Model,
    bad_words: list[list[int]],
) -> list[Sequence]:
    """The answers to a request, after `arrivals` other sequences. `room` is the maximum number of tokens."""
    ends = _ends(adapter, text, model)
    ignored = request.ignore_eos and request.grammar is None
    sampling, acts_from = _sampling(request, adapter, model), adapter.acts_from(prompt)
    allowed, bad = frozenset(request.allowed_token_ids or ()), tuple(map(tuple, bad_words))
    return [
        Sequence(
            number=arrivals + 1 + index,
            prompt_length=len(prompt),
            tokens=list(prompt),
            adapter=adapter,
            max_new_tokens=room,
            acts_from=acts_from,
            sampling=sampling.resolve(index),
            detail=request.detail,
            end_token_ids=frozenset(request.stop_token_ids) | (frozenset() if ignored else ends),
            min_new_tokens=request.min_new_tokens,
            grammar=request.grammar,
            allowed_token_ids=allowed,
            bad_words=bad,
            tenant=tenant.name,
            weight=tenant.weight,
            kv_share=tenant.kv_share,
            background=request.background,
            cache_salt=request.cache_salt,
            # After a complete match of a grammar, only an end token can follow, so it is postponed, not ignored.
            unwanted_token_ids=ends if request.ignore_eos and request.grammar is not None else frozenset(),
        )
        for index in range(request.n)
    ]


def _sampling(request: Request, adapter: Adapter, model: Model) -> Sampling:
    """With the adapter's own defaults in place of the model's, for what the request leaves open."""
    own = adapter.tokenizer.sampling_defaults if model.follows_generation_config else {}
    update = {name: value for name, value in own.items() if name in request.open_parameters}
    return request.sampling.model_copy(update=update) if update else request.sampling


def _ends(adapter: Adapter, text: Text, model: Model) -> frozenset[int]:
    """The tokens that end an answer: the model's, the adapter's, and the one that the chat template writes after an
    answer."""
    tokenizer = model.tokenizer_of(adapter)
    turn_end = tokenizer.special_token_at(text.turn_end) if isinstance(text, RenderedChat) else None
    known = (*model.end_token_ids, *adapter.tokenizer.end_token_ids)
    return frozenset(known if turn_end is None else (*known, turn_end))
