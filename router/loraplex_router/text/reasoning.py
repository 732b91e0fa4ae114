"""Separates what a model thinks from what it answers, while it arrives, and knows how families of models write it."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from loraplex_router.vocabulary.thoughts import Thoughts

AUTO, NONE = "auto", "none"  # as the prompt and the chat template show it; not at all

_THINK = Thoughts(("<think>",), ("</think>",))
_THINK_FIRST = replace(_THINK, begun=True)  # whether they write the opening tag or not
_SEED = Thoughts(("<seed:think>",), ("</seed:think>",))
_KIMI = Thoughts(("◁think▷",), ("◁/think▷",))
_MISTRAL = Thoughts(("[THINK]",), ("[/THINK]",))
_GRANITE = Thoughts(
    ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")
)
_COHERE = Thoughts(("<|START_THINKING|>",), ("<|END_THINKING|>",), before_answer="<|START_RESPONSE|>")
HARMONY = Thoughts(
    ("<|channel|>analysis<|message|>",), ("<|end|><|start|>assistant",), before_answer="<|channel|>final<|message|>"
)
_SEEN = (_THINK, _SEED, _KIMI, _MISTRAL, _COHERE, HARMONY, _GRANITE)  # where templates show them

# By the names of vLLM's and SGLang's --reasoning-parser, with _ for -.
FAMILIES = {
    **dict.fromkeys(("qwen3", "deepseek_v3", "glm45", "glm47", "kimi_k2", "holo2", "mimo", "nemotron_v3"), _THINK),
    **dict.fromkeys(("deepseek_r1", "qwen3_thinking", "minimax_m2", "olmo3", "step3", "step3p5"), _THINK_FIRST),
    "seed_oss": _SEED,
    "kimi": _KIMI,
    "mistral": _MISTRAL,
    "granite": _GRANITE,
    "cohere_command3": _COHERE,
    **dict.fromkeys(("openai_gptoss", "gpt_oss"), HARMONY),
}


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thoughts."""

    text: str


class ReasoningParser:
    """Turns text into thoughts and the answer after them. Text that does not begin with an opening tag has no thoughts,
    unless they have begun in the prompt. White space around the tags belongs to neither."""

    def __init__(self, thoughts: Thoughts) -> None:
        self._tags = thoughts
        self._held = ""  # undecided text
        self._strips = thoughts.begun  # white space before what comes next
        self._state = self._begin

    def feed(self, text: str) -> list[Reasoning | str]:
        self._held += text
        found, state = list[Reasoning | str](), None
        while state != self._state:
            state = self._state
            found += state()
        return found

    def flush(self) -> list[Reasoning | str]:
        """The undecided text at the end of the answer."""
        held, self._held = self._held.lstrip() if self._strips else self._held, ""
        if not held:
            return []
        thinks = self._state == self._think or (self._state == self._begin and self._tags.begun)
        return [Reasoning(held)] if thinks else [held]

    # ---- one method per state: it consumes what it can of the held text, and may set the next state -----------

    def _begin(self) -> list[Reasoning | str]:
        start = self._held.lstrip()
        opening = next(filter(start.startswith, self._tags.openings), None)
        if opening is not None:
            self._held, self._strips, self._state = start.removeprefix(opening), True, self._think
        elif not any(opening.startswith(start) for opening in self._tags.openings):
            self._state = self._think if self._tags.begun else self._seek_answer
        return []

    def _think(self) -> list[Reasoning | str]:
        self._strip()
        found = [(self._held.index(closing), closing) for closing in self._tags.closings if closing in self._held]
        if found:
            end, closing = min(found)
            thoughts, self._held = self._held[:end], self._held[end + len(closing) :]
            self._strips, self._state = True, self._seek_answer
        else:
            end = len(self._held) - max(undecided(self._held, closing) for closing in self._tags.closings)
            thoughts, self._held = self._held[:end], self._held[end:]
        return [Reasoning(thoughts)] if thoughts else []

    def _seek_answer(self) -> list[Reasoning | str]:
        self._strip()
        start, before = self._held.lstrip(), self._tags.before_answer
        if before and start.startswith(before):
            self._held, self._state = start.removeprefix(before), self._answer
        elif not before.startswith(start):
            self._state = self._answer
        return []

    def _answer(self) -> list[Reasoning | str]:
        text, self._held = self._held, ""
        return [text] if text else []

    def _strip(self) -> None:
        if self._strips:
            self._held = self._held.lstrip()
            self._strips = not self._held


def undecided(text: str, tag: str) -> int:
    """How many characters at the end of the text may begin the tag."""
    return max(n for n in range(len(tag)) if text.endswith(tag[:n]))


def find_thoughts(family: str, templates: Collection[str], prompt_end: str) -> Thoughts | None:
    """The thoughts that a chat's answer may have. `family`: a name in FAMILIES, AUTO or NONE. With AUTO, the prompt
    ends with an opening tag, or one of the chat templates mentions the tag before an answer. Where the prompt ends with
    a closing tag, thinking is switched off."""
    if family == NONE:
        return None
    known, ended = _SEEN if family == AUTO else (FAMILIES[family],), prompt_end.rstrip()
    for thoughts in known:
        if ended.endswith(thoughts.openings):
            return replace(thoughts, begun=True)
        if ended.endswith(thoughts.closings) and not thoughts.before_answer:
            return None
    for thoughts in known:
        marks = (thoughts.before_answer,) if thoughts.before_answer else thoughts.closings
        if family != AUTO or any(mark in template for template in templates for mark in marks):
            return thoughts
    return None
