"""The sampler's kernel draws the tokens that the sampler draws on a CPU. It runs in Triton's interpreter or, by
`bench.gpu`, on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_shard.sampling import cuda
from loraplex_shard.sampling.sampler import draw_each
from tests.shard.elsewhere import elsewhere
from tests.shard.test_sampler import parameters, random_logits

DRAW = elsewhere(cuda.draw)

pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")


@settings(deadline=None, max_examples=12)
@given(
    vocab=st.integers(1, 40) | st.just(1030),
    values=st.fixed_dictionaries(
        {"temperature": st.sampled_from([1e-40, 0.3, 1.0, 5.0])},
        optional={
            "top_k": st.sampled_from([1, 5, 600]),
            "top_p": st.sampled_from([1e-6, 0.3, 0.9, 0.999]),
            "min_p": st.sampled_from([0.01, 0.5, 1.0]),
        },
    ),
    scale=st.sampled_from([0.1, 3, 20]),
    allowed=st.sampled_from([0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_draws_what_the_sampler_draws(
    vocab: int, values: dict[str, float], scale: float, allowed: float, seed: int
) -> None:
    """For all numbers of which none is at the edge of a token, where rounding decides."""
    row = random_logits(1, vocab, scale, seed)
    hidden = torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) > allowed
    hidden[seed % vocab] = False
    row[:, hidden] = -torch.inf
    count = 4
    chosen = np.concatenate([parameters(values)] * count)
    uniform = (np.arange(count) + 0.377) / count
    expected = draw_each(row.repeat(count, 1), chosen, uniform)
    assert DRAW(row.repeat(count, 1), chosen, uniform).equal(expected)


def test_what_equals_the_last_kept_token_is_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 2.0, 0.0]]).repeat(12, 1)
    uniform = np.arange(12) / 12
    for values, kept in (({"top_k": 2}, {1, 3, 4}), ({"top_p": 0.55}, {1, 3, 4}), ({"min_p": 0.36}, {1, 3, 4})):
        chosen = np.concatenate([parameters({"temperature": 1.0, **values})] * 12)
        assert set(DRAW(logits, chosen, uniform).tolist()) == kept


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_distribution_yields_a_valid_token_and_spares_the_others(wrong: float) -> None:
    logits = random_logits(3, 70)
    chosen = np.concatenate([parameters({"temperature": 1.0, "top_p": 0.8, "top_k": 9})] * 3)
    uniform = np.array([0.1, 0.5, 0.9])
    expected = DRAW(logits, chosen, uniform)
    logits[1] = wrong
    logits[1, 7] = torch.nan
    actual = DRAW(logits, chosen, uniform)
    assert actual[[0, 2]].equal(expected[[0, 2]]) and 0 <= int(actual[1]) < 70
