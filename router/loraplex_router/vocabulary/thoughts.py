"""How a thinking model writes its thoughts, which come before its answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Thoughts stand between one of the openings and one of the closings. An answer may have none."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    before_answer: str = ""  # what comes before the answer, whether there are thoughts or not
    begun: bool = False  # the prompt has the opening, or none is written: the text begins with thoughts

    @property
    def tags(self) -> tuple[str, ...]:
        """Everything that belongs neither to the thoughts nor to the answer."""
        return (*self.openings, *self.closings, *([self.before_answer] if self.before_answer else []))
