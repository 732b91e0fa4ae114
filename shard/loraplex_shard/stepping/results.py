"""What a step found. Its thread collects it and goes on with the next plan; whoever answers waits until it has
arrived, and writes it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_protos.shard_pb2 import FAILURE_REASON_GRAMMAR, FAILURE_REASON_NOT_FINITE, StepResponse
from loraplex_shard.device.copies import Mark
from loraplex_shard.stepping.failures import Failures
from loraplex_shard.stepping.lineup import Ints
from loraplex_shard.stepping.tokens import PromptTokens, Tokens, add_prompt, add_tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens sampled after chunks, and the fast-forward tokens after them."""

    tokens: Tokens
    fast_forward: Ints  # [chunks, most], padded with -1
    scored: NDArray[np.bool_]  # whose fast-forward tokens are unscored: they are reported with their logprobs, later


@dataclass
class StepResults:
    """What a step of so many chunks found. Tensors are on their way to the host."""

    chunks: int
    failures: Failures
    finite: list[tuple[Ints, Tensor]] = field(default_factory=list)  # chunks' places, and whether their logits were
    broken: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # chunks whose grammars have failed
    prompt_counts: Ints | None = None
    prompt: list[PromptTokens] = field(default_factory=list)
    scored: list[Tokens] = field(default_factory=list)  # unscored tokens that have their logprobs now
    sample: Sample | None = None
    pooled: list[tuple[int, Tensor]] = field(default_factory=list)  # place of the chunk, vector

    def write(self, response: StepResponse) -> None:
        """Fills the response with what has arrived."""
        for places, finite in self.finite:
            found = finite.numpy()
            if not found.all():
                self.failures.add(places[~found], FAILURE_REASON_NOT_FINITE)
        self.failures.add(self.broken, FAILURE_REASON_GRAMMAR)
        for tokens in self.prompt:
            add_prompt(response, tokens)
        if self.prompt_counts is not None:
            response.prompt_logprob_counts.extend(self.prompt_counts.tolist())
        add_tokens(response, self.chunks, [*self.scored, *self._sampled(response)])
        self._add_pooled(response)
        self.failures.write(response)

    def _sampled(self, response: StepResponse) -> list[Tokens]:
        """The sampled tokens of sequences that have not failed, and the fast-forward tokens that are reported now. Adds
        the others, which are unscored, to the response."""
        if self.sample is None:
            return []
        tokens, fast_forward, scored = self.sample.tokens, self.sample.fast_forward, self.sample.scored
        if self.failures:
            spared = self.failures.spare(tokens.places)
            tokens, fast_forward, scored = tokens.of(spared), fast_forward[spared], scored[spared]
        if not fast_forward.size:
            return [tokens]
        known = fast_forward >= 0
        now, later = known & ~scored[:, None], known & scored[:, None]
        if later.any():
            counts = np.bincount(tokens.places, later.sum(1), self.chunks).astype(int)
            response.unscored_counts.extend(counts.tolist())
            response.unscored_tokens.extend(fast_forward[later].tolist())
        reported = Tokens(np.repeat(tokens.places, now.sum(1)), torch.from_numpy(fast_forward[now]))
        return [tokens, reported] if now.any() else [tokens]

    def _add_pooled(self, response: StepResponse) -> None:
        for place, vector in self.pooled:
            if vector.isfinite().all():
                response.pooled_chunks.append(place)
                response.pooled_lengths.append(len(vector))
                response.pooled.extend(vector.tolist())
            else:
                self.failures.add(np.array([place]), FAILURE_REASON_NOT_FINITE)


class PendingStep:
    """A step that the device may still compute. Made after everything that the step asks of the device."""

    def __init__(self, step: int, device: torch.device, results: StepResults | None) -> None:
        """`results`: None on ranks other than 0."""
        self._step, self._mark, self._results = step, Mark(device), results

    def wait(self) -> float:
        """See Mark.wait."""
        return self._mark.wait()

    def response(self) -> StepResponse:
        """Waits for the step. On ranks other than 0, the response holds no more than its number."""
        self.wait()
        response = StepResponse(step=self._step)
        if self._results is not None:
            self._results.write(response)
        return response
