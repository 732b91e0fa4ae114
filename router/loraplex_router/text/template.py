"""One chat template, rendered as transformers does it, with messages in the form that it reads.

Imports transformers, so it belongs to the process that renders (template_process.py), not to the router's process.
"""

from collections.abc import Mapping
from typing import Any, cast

from jinja2.meta import find_undeclared_variables
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from loraplex_router.text.template_messages import adapt, complete
from loraplex_router.text.template_traits import Row, find_traits

# Arguments of render_jinja_template that are not the template's variables, and variables that it sets itself.
RESERVED = frozenset(
    ("conversations", "messages", "tools", "chat_template", "return_assistant_tokens_mask", "continue_final_message")
)


class Template:
    """Raises jinja2.TemplateSyntaxError if `source` is not a template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = special_tokens
        environment = _compile_jinja_template(source).environment
        self._traits = find_traits(source, find_undeclared_variables(environment.parse(source)), self._render)
        self.turn_end = self._traits.turn_end

    def render(
        self,
        messages: list[Row],
        tools: list[Row] | None = None,
        documents: list[Row] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt. With `continue_final_message`, nothing follows the last message's text. `variables` may stand in
        for special tokens, documents and add_generation_prompt.

        Raises whatever the template raises, and ValueError for variables that cannot be set.
        """
        variables = variables or {}
        if taken := RESERVED & variables.keys():
            raise ValueError(f"chat_template_kwargs cannot set {', '.join(sorted(taken))}")
        given = {"documents": documents, "add_generation_prompt": add_generation_prompt, **variables}
        if continue_final_message:
            given["continue_final_message"] = True
        return self._render(adapt(messages, tools, self._traits), tools and complete(tools, self._traits), **given)

    def _render(self, rows: list[Row], tools: Any, **variables: Any) -> str:
        given = {**self._special_tokens, **variables}
        rendered = render_jinja_template([rows], tools=tools, chat_template=self._source, **given)
        texts, _ = cast(tuple[list[str], object], rendered)  # its annotation is wrong
        return texts[0]
