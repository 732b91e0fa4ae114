"""The sampler compared with transformers' processors, with exact probabilities, and with itself in other batches."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from loraplex_protos.generation_pb2 import Sampling
from loraplex_shard.sampling import few_rows
from loraplex_shard.sampling.draws import uniforms
from loraplex_shard.sampling.sampler import head, likeliest, logprobs, ranks, sample, totals, warped
from loraplex_shard.sampling.stages import (
    BEFORE_TEMPERATURE,
    HEAD,
    NEUTRAL,
    PARAMETERS,
    STAGES,
    History,
    read_parameters,
)

VOCAB = 3 * HEAD
GREEDY: dict[str, float] = {}
RANDOM = {"temperature": 1}


def parameters(*sequences: dict[str, float]) -> NDArray[np.void]:
    """Parameters of sequences; those not given are neutral."""
    return np.array([tuple((NEUTRAL | values).values()) for values in sequences], PARAMETERS)


def random_logits(count: int, vocab: int = VOCAB, scale: float = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def history(*sequences: tuple[list[int], int]) -> History:
    """The history of sequences, each as (tokens, prompt length). Memory after the tokens must not matter."""
    tokens = torch.full((len(sequences), max(len(ids) for ids, _ in sequences) + 3), -7, dtype=torch.int32)
    for row, (ids, _) in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids)
    lengths = np.array([len(ids) for ids, _ in sequences])
    return History(tokens, np.arange(len(sequences)), np.array([prompt for _, prompt in sequences]), lengths)


@pytest.mark.parametrize(
    ("values", "warper"),
    [
        ({"temperature": 0.7}, TemperatureLogitsWarper(0.7)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 50}, TopKLogitsWarper(50)),
        ({"top_k": VOCAB + 1}, TopKLogitsWarper(VOCAB)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ({"min_p": 1}, MinPLogitsWarper(1.0)),
        ({"typical_p": 0.2}, TypicalLogitsWarper(0.2)),
        ({"typical_p": 0.95}, TypicalLogitsWarper(0.95)),
        (
            {"temperature": 1.5, "top_k": 700, "top_p": 0.9, "min_p": 0.001, "typical_p": 0.8},
            LogitsProcessorList(
                [
                    TemperatureLogitsWarper(1.5),
                    TopKLogitsWarper(700),
                    TopPLogitsWarper(0.9),
                    MinPLogitsWarper(0.001),
                    TypicalLogitsWarper(0.8),
                ]
            ),
        ),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 3, 20])
def test_warping_equals_transformers(
    values: dict[str, float], warper: Callable[[None, torch.Tensor], torch.Tensor], scale: float
) -> None:
    logits = random_logits(4, scale=scale)
    warped_logits = warped(logits, parameters(*[{**RANDOM, **values}] * 4))
    expected = warper(None, logits)
    torch.testing.assert_close(warped_logits.softmax(-1), expected.softmax(-1))
    assert torch.equal(warped_logits.isneginf(), expected.isneginf())


def test_each_row_is_warped_by_its_own_parameters() -> None:
    logits = random_logits(5)
    each = [RANDOM, {**RANDOM, "top_k": 3}, {**RANDOM, "top_p": 0.5}, {**RANDOM, "min_p": 0.3}, {**RANDOM, "top_k": 9}]
    kept = (~warped(logits, parameters(*each)).isneginf()).sum(-1).tolist()
    assert kept[0] == VOCAB
    assert (kept[1], kept[4]) == (3, 9)
    for row in range(5):
        alone = warped(logits[row : row + 1], parameters(each[row]))
        assert torch.equal(warped(logits, parameters(*each))[row], alone[0])


@pytest.mark.parametrize(
    "values",
    [{"top_k": 5}, {"top_k": 600}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.7, "typical_p": 0.5}],
)
@pytest.mark.parametrize("scale", [0.1, 3, 20])
@pytest.mark.parametrize("vocab", [HEAD - 1, VOCAB + 5, 40 * HEAD])
def test_the_head_has_all_tokens_that_warping_keeps_or_reports_that_it_does_not(
    values: dict[str, float], scale: float, vocab: int
) -> None:
    # Rounded, so that many tokens equal the last one that is kept.
    logits = (random_logits(6, vocab, scale) * 8).round() / 8
    each = parameters(*[{**RANDOM, **values}] * 6)
    expected = warped(logits, each).softmax(-1)
    logprobs_left, tokens, whole = head(logits, each)
    found = torch.zeros_like(expected).scatter_(1, tokens, logprobs_left.softmax(-1))
    assert torch.equal(whole, (expected > 0).sum(-1) < min(HEAD, vocab) + (vocab < HEAD))
    torch.testing.assert_close(found[whole], expected[whole])


@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.1, 1.0])
@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_p": 0.9999}, {"typical_p": 0.9}, {"top_k": HEAD + 1}])
def test_rows_of_which_much_is_left_are_cut_without_sorting_the_vocabulary(
    values: dict[str, float], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(4, 40 * HEAD, scale)
    logits[1] = (logits[1] * 20).round() / 20  # with ties
    logits[2, ::3] = -torch.inf
    logits[3] = 0  # all are equal
    chosen = logits.log_softmax(-1)
    weights = torch.ones_like(chosen) if "top_k" in values else chosen.exp()
    entropy = torch.special.entr(chosen.exp()).sum(-1, keepdim=True)
    order = (-chosen - entropy).abs() if "typical_p" in values else -chosen
    first = order.sort(-1)
    reached = weights.double().gather(-1, first.indices).cumsum(-1)
    (mass,) = values.values()
    last = first.values.gather(-1, (reached < mass).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1))

    topk, sizes = torch.Tensor.topk, list[int]()
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda rows, k, *a, **options: sizes.append(k) or topk(rows, k, *a, **options)
    )
    left = warped(logits, parameters(*[{**RANDOM, **values}] * 4)) > -torch.inf
    assert max(sizes) <= HEAD
    expected = (order <= last) & (logits > -torch.inf)
    # Of numbers at the edge, rounding decides.
    near = ((order - last).abs() <= 1e-5) & (logits > -torch.inf)
    assert torch.equal(left & ~near, expected & ~near) and left.any(-1).all()


@given(vocab=st.integers(1, 100), seed=st.integers(0, 99))
def test_greedy_and_likeliest_equal_argmax_and_topk_for_any_vocabulary(vocab: int, seed: int) -> None:
    logits = random_logits(3, vocab, seed=seed).round()  # with ties
    assert torch.equal(sample(logits, parameters(*[GREEDY] * 3), history(*[([0], 1)] * 3)), logits.argmax(-1))
    count = 1 + seed % vocab
    ids, values = likeliest(logits, count, totals(logits))
    assert all(len(set(row)) == count for row in ids.tolist())
    torch.testing.assert_close(values, logits.log_softmax(-1).topk(count).values)
    each = logits.repeat_interleave(count, 0)
    torch.testing.assert_close(values, logprobs(each, ids.flatten(), totals(each)).view(3, count))


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(2)
    sequences = ([5, 9, 9, 2], 2), ([VOCAB - 1, 0], 1)
    tokens = sample(logits, parameters(*[{**GREEDY, "repetition_penalty": 40.0}] * 2), history(*sequences))
    for row, (ids, _) in enumerate(sequences):
        processor = RepetitionPenaltyLogitsProcessor(40.0)
        assert tokens[row] == processor(torch.tensor([ids]), logits[row : row + 1]).argmax()


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.tensor([[3.0, 2.9, 2.8, -1.0]])
    with_penalty = parameters({**GREEDY, "repetition_penalty": 2})
    assert sample(logits, with_penalty, history(([0], 1))).item() == 1
    assert sample(logits, with_penalty, history(([0, 1], 1))).item() == 2
    negative = torch.tensor([[-1.0, -1.5, -3.0]])
    assert sample(negative, with_penalty, history(([0], 1))).item() == 1


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0]])
    frequency, presence = {**GREEDY, "frequency_penalty": 0.4}, {**GREEDY, "presence_penalty": 0.4}
    thrice, prompt = history(([2, 0, 0, 0], 1)), history(([0, 0, 0, 2], 3))
    assert sample(logits, parameters(frequency), thrice).item() == 1
    assert sample(logits, parameters(frequency), prompt).item() == 0
    assert sample(logits, parameters(presence), thrice).item() == 0
    assert sample(logits, parameters({**presence, "presence_penalty": 1.1}), thrice).item() == 1
    assert sample(logits, parameters({**presence, "presence_penalty": -2.1}), history(([0, 2], 1))).item() == 0
    assert sample(logits, parameters({**GREEDY, "presence_penalty": -1.1}), history(([0, 1], 1))).item() == 1


def test_top_n_sigma_uses_the_deviation_of_the_allowed_tokens() -> None:
    logits = random_logits(3)
    logits[1, 5:] = -torch.inf
    each = parameters({"top_n_sigma": 1.5}, {"top_n_sigma": 0.7}, {})
    kept = BEFORE_TEMPERATURE[-1].apply(logits, each, history(*[([0], 1)] * 3))
    for row in (0, 1):
        allowed = logits[row][logits[row] > -torch.inf].double()
        least = allowed.max() - each["top_n_sigma"][row] * allowed.std(correction=0)
        assert torch.equal(kept[row] > -torch.inf, logits[row] >= least)
        assert 1 < (kept[row] > -torch.inf).sum() < len(allowed)
    assert torch.equal(kept[2], logits[2])
    assert sample(logits, each, history(*[([0], 1)] * 3)).tolist() == logits.argmax(-1).tolist()


def test_penalties_of_some_rows_do_not_change_the_others() -> None:
    logits = torch.tensor([[3.0, 2.0]]).repeat(3, 1)
    each = parameters(GREEDY, {**GREEDY, "repetition_penalty": 5}, GREEDY)
    assert sample(logits, each, history(([0], 1), ([0], 1), ([0], 1))).tolist() == [0, 1, 0]


def test_sampling_does_not_change_the_logits() -> None:
    logits = random_logits(2)
    before = logits.clone()
    everything = {"temperature": 0.5, "top_k": 4, "top_p": 0.5, "typical_p": 0.5, "min_p": 0.1, "seed": 3}
    penalties = {"repetition_penalty": 2, "frequency_penalty": 1, "presence_penalty": 1}
    sample(logits, parameters({**everything, **penalties}, GREEDY), history(([1, 2], 1), ([3], 1)))
    assert torch.equal(logits, before)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [700, 40, 1000]] = 1
    assert sample(logits, parameters(GREEDY), history(([0], 1))).item() == 40


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    logits = random_logits(3, scale=50)
    tokens = sample(logits, parameters(*[{**RANDOM, "temperature": 1e-38}] * 3), history(*[([0], 1)] * 3))
    assert torch.equal(tokens, logits.argmax(-1))


def test_every_parameter_of_the_protocol_is_known_and_absent_ones_skip_their_stage() -> None:
    assert {*NEUTRAL, "logit_bias"} == set(Sampling.DESCRIPTOR.fields_by_name)
    absent = np.array([read_parameters(Sampling())], PARAMETERS)
    assert not any(stage.needed(absent).any() for stage in STAGES)
    given = np.array([read_parameters(Sampling(**dict.fromkeys(NEUTRAL, 2)))], PARAMETERS)  # type: ignore[arg-type]
    assert given.tolist() == [(2,) * len(NEUTRAL)] and all(stage.needed(given).all() for stage in STAGES)


LIMITS = {
    "temperature": [0, 1e-45, 1e-38, 1, 3.4e38],
    "top_k": [0, 1, 2**32 - 1],
    "top_p": [1e-45, 1e-6, 1],
    "typical_p": [1e-45, 1e-6, 1],
    "min_p": [0, 1e-45, 1],
    "top_n_sigma": [0, 1e-45, 1, 3.4e38],
    "repetition_penalty": [0, 1e-45, 1e-38, 1, 3.4e38],
    "frequency_penalty": [-2, 0, 2],
    "presence_penalty": [-2, 0, 2],
    "seed": [0, 2**64 - 1],
}


@given(
    sequences=st.lists(
        st.fixed_dictionaries({name: st.sampled_from(values) for name, values in LIMITS.items()}),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1.0, 1e4, 1e30]),
)
@settings(max_examples=150, deadline=None)
def test_an_allowed_token_is_chosen_at_the_limits_of_all_parameters(
    sequences: list[dict[str, float]], seed: int, scale: float
) -> None:
    count = len(sequences)
    logits = random_logits(count, 48, scale, seed)
    forbidden = random_logits(count, 48, seed=seed + 10) > 1
    forbidden[:, seed] = False
    logits[forbidden] = -torch.inf
    with np.errstate(all="raise"):
        tokens = sample(logits, parameters(*sequences), history(*[([seed, 1, 2, 3, 3], 3)] * count))
    assert not forbidden.gather(1, tokens[:, None]).any()


def test_a_row_with_nan_yields_a_valid_token_and_spares_the_others() -> None:
    logits = random_logits(3, vocab=20)
    each = parameters(
        {**RANDOM, "seed": 1}, {**RANDOM, "top_p": 0.5, "typical_p": 0.5, "top_k": 3, "min_p": 0.1}, RANDOM
    )
    expected = sample(logits, each, history(*[([0], 1)] * 3))
    logits[1] = torch.nan
    tokens = sample(logits, each, history(*[([0], 1)] * 3))
    assert 0 <= tokens[1] < 20
    assert torch.equal(tokens[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("values", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"typical_p": 0.5}])
@pytest.mark.parametrize("vocab", [8, 40])
def test_tokens_are_sampled_with_their_probability(values: dict[str, float], vocab: int) -> None:
    draws = 20_000
    logits = random_logits(1, vocab=vocab, scale=1.5, seed=2)
    each = np.repeat(parameters({**RANDOM, **values}), draws)
    each["seed"] = np.arange(draws)
    one = history(([0], 1))
    many = History(one.tokens, np.zeros(draws, np.int64), one.prompt_lengths.repeat(draws), one.lengths.repeat(draws))
    counts = sample(logits.repeat(draws, 1), each, many).bincount(minlength=vocab).double()
    expected = warped(logits, each[:1])[0].double().softmax(-1) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = vocab - 1
    assert chi_square < freedom + 6.2 * (2 * freedom) ** 0.5  # one in 10,000 seeds would exceed it


def test_a_sequence_draws_a_new_number_for_every_token() -> None:
    counters = np.arange(10_000)
    drawn = uniforms(np.full(10_000, 7, np.uint64), counters)
    assert len(np.unique(drawn)) == 10_000
    assert drawn.min() >= 0 and drawn.max() < 1
    histogram = np.histogram(drawn, 10, (0, 1))[0]
    assert ((histogram - 1000) ** 2 / 1000).sum() < 33
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05


def test_neighbouring_seeds_draw_unrelated_numbers() -> None:
    first = uniforms(np.arange(10_000, dtype=np.uint64), np.zeros(10_000, np.int64))
    second = uniforms(np.arange(1, 10_001, dtype=np.uint64), np.zeros(10_000, np.int64))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(first.mean() - 0.5) < 0.02


def test_the_largest_seed_is_accepted() -> None:
    assert 0 <= uniforms(np.array([2**64 - 1], np.uint64), np.array([2**31]))[0] < 1


sequences = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.3, 1, 2]),
        "top_k": st.sampled_from([0, 1, 5, 600]),
        "top_p": st.sampled_from([1, 0.1, 0.9, 0.999]),
        "typical_p": st.sampled_from([1, 0.2, 0.95]),
        "min_p": st.sampled_from([0, 0.01, 0.5]),
        "top_n_sigma": st.sampled_from([0, 1.5]),
        "repetition_penalty": st.sampled_from([1, 1.3]),
        "frequency_penalty": st.sampled_from([0, 0.5, -0.5]),
        "presence_penalty": st.sampled_from([0, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(st.tuples(sequences, st.lists(st.integers(0, 50), min_size=1, max_size=9)), min_size=2, max_size=6),
    scale=st.sampled_from([0.5, 3]),
    data=st.data(),
)
def test_the_chosen_token_does_not_depend_on_the_batch(
    chosen: list[tuple[dict[str, float], list[int]]], scale: float, data: st.DataObject
) -> None:
    logits = random_logits(len(chosen), scale=scale)
    past = history(*[(tokens, data.draw(st.integers(1, len(tokens)))) for _, tokens in chosen])
    each = parameters(*[values for values, _ in chosen])
    together = sample(logits, each, past)
    order = np.array(data.draw(st.permutations(range(len(chosen))))[: data.draw(st.integers(1, len(chosen)))])
    others = sample(
        logits[order], each[order], History(past.tokens, order, past.prompt_lengths[order], past.lengths[order])
    )
    assert torch.equal(together[order], others)


def test_logprobs_are_computed_from_the_raw_logits() -> None:
    logits = random_logits(3)
    tokens = torch.tensor([4, 0, VOCAB - 1])
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs(logits, tokens, totals(logits)), expected[range(3), tokens])
    ids, values = likeliest(logits, 5, totals(logits))
    best = expected.sort(descending=True)
    assert torch.equal(ids, best.indices[:, :5])
    torch.testing.assert_close(values, best.values[:, :5])


def test_many_rows_are_reduced_a_few_at_a_time_and_each_as_if_it_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "IN_CACHE", 4 * VOCAB // torch.get_num_threads())
    logits = random_logits(11).round()  # with ties
    tokens = torch.arange(11) * 7
    seen = list[int]()

    def logsumexp(rows: torch.Tensor, *of: int, keepdim: bool) -> torch.Tensor:
        seen.append(len(rows))
        return torch.logsumexp(rows, *of, keepdim=keepdim)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "logsumexp", logsumexp)
        found = totals(logits)
    assert max(seen) <= 4 and sum(seen) == 11
    torch.testing.assert_close(found, logits.logsumexp(-1, keepdim=True))
    own = logits.gather(1, tokens[:, None])
    assert torch.equal(ranks(logits, tokens), (logits >= own).sum(1))
    assert not len(totals(logits[:0])) and not len(ranks(logits[:0], tokens[:0]))
