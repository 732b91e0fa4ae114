"""What is reported of a step's tokens."""

import numpy as np
import pytest
import torch

from loraplex_shard.sampling import sampler
from loraplex_shard.stepping.lineup import DETAIL
from loraplex_shard.stepping.tokens import describe, describe_prompt

PLACES = np.arange(3)
IDS = torch.tensor([0, 4, 1])
LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))


def test_a_tokens_logprob_and_its_alternatives_have_one_total_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = list[int]()

    def totals(logits: torch.Tensor) -> torch.Tensor:
        passes.append(len(logits))
        return logits.logsumexp(-1, keepdim=True)

    monkeypatch.setattr(sampler, "totals", totals)
    detail = np.zeros(3, DETAIL)
    described = describe(PLACES, IDS, LOGITS, detail)
    assert described.logprobs is None and described.alternatives is None and not passes
    detail["logprobs"], detail["top_logprobs"] = True, [2, 0, 3]
    described, of_prompt = describe(PLACES, IDS, LOGITS, detail), describe_prompt(IDS, LOGITS, np.array([2, 0, 3]))
    assert passes == [3, 3]
    for found in (described, of_prompt):
        assert found.logprobs is not None and found.alternatives is not None
        torch.testing.assert_close(found.logprobs, LOGITS.log_softmax(-1)[range(3), IDS])
        assert found.alternatives.read()[0].tolist() == [*LOGITS[0].topk(2).indices, *LOGITS[2].topk(3).indices]
