"""Separates what a model thinks from what it answers, while it arrives.

Qwen3, DeepSeek-R1 and many others write their thoughts first, between tags. Some chat templates begin an answer with
the opening tag, so that only the closing one is in the answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

TAGS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thoughts."""

    text: str


class ReasoningParser:
    """Turns text into thoughts and the answer after them. `begun`: the prompt ends with the opening tag. Without it, an
    answer that does not begin with this tag has no thoughts. White space after the tags belongs to neither."""

    def __init__(self, tags: tuple[str, str], begun: bool) -> None:
        self._opening, self._closing = tags
        self._held = ""  # undecided text
        self._thinks = begun
        self._undecided = True  # whether the answer begins with the opening tag
        self._strips = begun  # white space before what comes next
        self._done = False

    def feed(self, text: str) -> list[Reasoning | str]:
        if self._done and not self._strips:
            return [text] if text else []
        self._held += text
        if self._undecided and not self._decide():
            return []
        found = list[Reasoning | str]()
        if self._thinks and not self._done:
            found += self._think()
        if self._done:
            found += self._answer()
        return found

    def flush(self) -> list[Reasoning | str]:
        """The undecided text at the end of the answer."""
        held, self._held = self._held, ""
        if self._strips:
            held = held.lstrip()
        if not held:
            return []
        return [Reasoning(held)] if self._thinks and not self._done else [held]

    def _decide(self) -> bool:
        start = self._held.lstrip()
        if start.startswith(self._opening):
            self._thinks, self._held = True, start.removeprefix(self._opening)
        elif self._opening.startswith(start):
            return False
        self._undecided, self._strips, self._done = False, self._thinks, not self._thinks
        return True

    def _think(self) -> Iterable[Reasoning]:
        self._strip()
        thoughts, tag, after = self._held.partition(self._closing)
        if tag:
            self._held, self._done, self._strips = after, True, True
        else:
            kept = max(n for n in range(len(self._closing)) if thoughts.endswith(self._closing[:n]))
            thoughts, self._held = thoughts[: len(thoughts) - kept], thoughts[len(thoughts) - kept :]
        return [Reasoning(thoughts)] if thoughts else []

    def _answer(self) -> Iterable[str]:
        self._strip()
        text, self._held = self._held, ""
        return [text] if text else []

    def _strip(self) -> None:
        if self._strips:
            self._held = self._held.lstrip()
            self._strips = not self._held


def find_tags(templates: Iterable[str], prompt_end: str) -> tuple[tuple[str, str], bool] | None:
    """The tags that a chat's answer may have, and whether the prompt ends with the opening one. `templates`: the chat
    templates, of which thinking models' mention the closing tag."""
    ended = prompt_end.rstrip()
    for opening, closing in TAGS:
        if ended.endswith(opening):
            return (opening, closing), True
    for tags in TAGS:
        if any(tags[1] in template for template in templates):
            return tags, False
    return None
