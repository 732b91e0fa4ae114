"""Grammars of answers that may begin with free thoughts."""

import json
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from llguidance import LLTokenizer

from loraplex_protos.shard_pb2 import Thoughts

GAP = r"gap: /[ \t\r\n]{1,4}/"  # around tags


def after_thoughts(answer: dict[str, Any], thoughts: Thoughts, tokenizer: LLTokenizer) -> str:
    """Thoughts, and then what `answer`, in llguidance's form, describes. A tag may be special tokens or text."""
    first = "(gap? opening)? thoughts gap?" if thoughts.begun else "(gap? opening thoughts gap?)?"
    closed = "|".join(re.escape(tag).replace("/", r"\/") for tag in thoughts.closings)
    rules = [
        f"start: {first} {_spell(thoughts.before_answer, tokenizer)} @answer",
        f"opening: {_any_of(thoughts.openings, tokenizer)}",
        f"thoughts: /(?s:.*)/ ({_any_of(thoughts.closings, tokenizer)}) | closed",
        rf"closed[lazy]: /(?s:.*)({closed})/",
        GAP,
    ]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, {"name": "answer", **answer}]})


def _any_of(tags: Iterable[str], tokenizer: LLTokenizer) -> str:
    return " | ".join(dict.fromkeys(form for tag in tags for form in (_spell(tag, tokenizer), json.dumps(tag))))


def _spell(tag: str, tokenizer: LLTokenizer) -> str:
    """With the special tokens that the tokenizer reads in it."""
    spelled = list[str]()
    for special, tokens in groupby(tokenizer.tokenize_str(tag), tokenizer.is_special_token):
        if special:
            spelled += (f"<[{token}]>" for token in tokens)
        else:
            spelled.append(json.dumps(tokenizer.decode_bytes(list(tokens)).decode(), ensure_ascii=False))
    return " ".join(spelled)
