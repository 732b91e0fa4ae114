"""What is new of an answer since its reader last looked."""

from dataclasses import dataclass, field

from loraplex_router.vocabulary.sequence import FinishReason, Sample


@dataclass(slots=True)
class Delta:
    """What is new since the reader last looked."""

    text: str = ""
    samples: list[Sample] = field(default_factory=list)
    ends: list[int] = field(
        default_factory=list
    )  # for each sample, the text's length up to its end, in whole characters
    finish_reason: FinishReason | None = None  # set on the last one
    generated: int = 0  # tokens of the sequence up to here; the text of some may still be held back
    known: int = 0  # how many of the events that it is written as the client has already

    def add(self, later: "Delta") -> None:
        """Appends the delta that follows this one."""
        self.text += later.text
        self.samples += later.samples
        self.ends += later.ends
        self.finish_reason = later.finish_reason
        self.generated = later.generated

    @property
    def num_logprobs(self) -> int:
        """Number of logprobs, including alternatives."""
        return len(self.samples) * (1 + len(self.samples[0].alternatives)) if self.samples else 0

    @property
    def mean_logprob(self) -> float:
        """The mean logprob of its tokens, by which answers are ranked. Their logprobs must be known."""
        return sum(sample.logprob or 0.0 for sample in self.samples) / max(1, len(self.samples))
