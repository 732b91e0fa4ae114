"""Reads the text files beside an adapter: its chat templates, its special tokens and its end tokens.

The files are those that transformers saves with a tokenizer, and are read by its rules. Templates are not interpreted
here: the router renders them.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loraplex_shard.sampling.defaults import sampling_defaults

TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
ADDED_TOKENS = "added_tokens.json"  # of tokenizers without a tokenizer.json
NAMED_TEMPLATES = "additional_chat_templates"  # a folder

MAX_TEMPLATE = 2**18  # bytes
MAX_NAMED = 16
TEXT_SIZE_LIMITS = {
    TEMPLATE: MAX_TEMPLATE,
    PROCESSOR_TEMPLATE: 2 * MAX_TEMPLATE,
    TOKENIZER_CONFIG: 2**24,
    SPECIAL_TOKENS: 2**20,
    GENERATION_CONFIG: 2**20,
    TOKENIZER: 2**26,
    ADDED_TOKENS: 2**22,
}

# The special tokens that every tokenizer of transformers may have.
ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NAMED = re.compile(rf"{NAMED_TEMPLATES}/([A-Za-z0-9_.-]{{1,96}})\.jinja")


_OF_TOKENIZER = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
_MOST_ADDED = 2**22  # bytes of a tokenizer.json's list of them


@dataclass(frozen=True, slots=True)
class AddedToken:
    """As the `tokenizers` library has it."""

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


@dataclass(frozen=True, slots=True)
class AdapterText:
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # by name: "default", "tool_use"
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # an empty text: the tokenizer has no such token
    end_token_ids: tuple[int, ...] = ()
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)  # added to its tokenizer, by id
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # for requests that leave them open
    error: str = ""  # why the files cannot be read; then everything else is empty

    @property
    def content(self) -> bytes:
        """Bytes that are the same for the same text; empty if there is no text."""
        return json.dumps(asdict(self), sort_keys=True).encode() if self != AdapterText() else b""


def text_files(names: Iterable[str]) -> tuple[str, ...]:
    """Chooses the text files to be read from the names of an adapter's files."""
    names = frozenset(names)
    named = sorted(name for name in names if _NAMED.fullmatch(name))[:MAX_NAMED]
    return (*(name for name in TEXT_SIZE_LIMITS if name in names), *named)


def read_text(files: Mapping[str, bytes]) -> AdapterText:
    """Reads the files, given by name. If they cannot be read, only conversations with the adapter are refused."""
    name = ""
    try:
        contents = dict[str, Any]()
        for name, data in files.items():
            if name == TOKENIZER:
                continue
            contents[name] = json.loads(data) if name.endswith(".json") else data.decode()
            if name.endswith(".json") and not isinstance(contents[name], dict):
                raise ValueError("it is not a JSON object")
        name = TOKENIZER_CONFIG
        templates = _templates(contents)
        tokens = _special_tokens(contents)
        added = _added_tokens(contents.get(TOKENIZER_CONFIG, {}))
        name = ADDED_TOKENS
        added = _before_tokenizer_json(contents.get(ADDED_TOKENS, {}), set(tokens.values())) | added
        name = TOKENIZER
        added = _of_tokenizer_json(files.get(TOKENIZER, b"")) | added
        name = GENERATION_CONFIG
        generation = contents.get(GENERATION_CONFIG, {})
        defaults = sampling_defaults(generation, f"an adapter's {GENERATION_CONFIG}")
        return AdapterText(templates, tokens, _end_token_ids(generation), added, defaults)
    except (ValueError, RecursionError) as error:
        return AdapterText(error=f"{name}: {error}"[:500])


def _templates(contents: Mapping[str, Any]) -> dict[str, str]:
    """The templates. If there are template files, those in a configuration are ignored."""
    own = {"default": contents[TEMPLATE]} if TEMPLATE in contents else {}
    own |= {match[1]: text for name, text in contents.items() if (match := _NAMED.fullmatch(name))}
    for name in (TOKENIZER_CONFIG, PROCESSOR_TEMPLATE):
        own = own or _configured(contents.get(name, {}).get("chat_template"))
    for name, template in own.items():
        if len(template.encode()) > MAX_TEMPLATE:
            raise ValueError(f"the chat template {name[:100]!r} has more than {MAX_TEMPLATE} bytes")
    return own


def _configured(given: Any) -> dict[str, str]:
    """The templates in a configuration: one, a list as transformers writes it, or several by name."""
    match given:
        case None | "":
            return {}
        case str():
            return {"default": given}
        case list():
            given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if not isinstance(given, dict) or not all(isinstance(text, str) for item in given.items() for text in item):
        raise ValueError("chat_template is neither a string nor a list of named templates")
    return given


def _special_tokens(contents: Mapping[str, Any]) -> dict[str, str]:
    config, mapped = contents.get(TOKENIZER_CONFIG, {}), contents.get(SPECIAL_TOKENS, {})
    named = dict(config)
    if "added_tokens_decoder" not in config:  # the format of older versions of transformers
        named |= mapped
    for name in ("extra_special_tokens", "model_specific_special_tokens"):
        named |= named[name] if isinstance(named.get(name), dict) else {}
    # If the tokenizer was saved whole, a token that is not listed does not exist.
    tokens = dict.fromkeys(ATTRIBUTES, "") if "tokenizer_class" in config else {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            text.encode()  # raises UnicodeEncodeError for what is not text
            tokens[name] = text
        elif name in ATTRIBUTES and token is None:
            tokens[name] = ""
    return tokens


def _added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    given = config.get("added_tokens_decoder")
    given = given if isinstance(given, dict) else {}
    return {int(id): token for id, entry in given.items() if id.isdecimal() and (token := _added_token(entry))}


def _of_tokenizer_json(data: bytes) -> dict[int, AddedToken]:
    """Those of a tokenizer.json. The rest of it, which may have many megabytes, is not parsed."""
    match = _OF_TOKENIZER.search(data)
    if match is None:
        return {}
    text = data[match.end() : match.end() + _MOST_ADDED].decode(errors="ignore")
    entries, _ = json.JSONDecoder().raw_decode(text)
    named = [(entry.get("id"), _added_token(entry)) for entry in entries if isinstance(entry, dict)]
    return {id: token for id, token in named if isinstance(id, int) and 0 <= id < 2**31 and token}


def _before_tokenizer_json(named: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Those of an added_tokens.json, which has their ids by their texts."""
    ids = {id: text for text, id in named.items() if isinstance(id, int) and 0 <= id < 2**31}
    return {id: AddedToken(text, text in special, normalized=text not in special) for id, text in ids.items()}


def _added_token(entry: Any) -> AddedToken | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        return None
    entry["content"].encode()  # raises UnicodeEncodeError for what is not text
    given = {f.name: entry[f.name] for f in fields(AddedToken) if isinstance(entry.get(f.name), bool)}
    return AddedToken(entry["content"], **given)


def _end_token_ids(generation: Mapping[str, Any]) -> tuple[int, ...]:
    named = generation.get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise ValueError("eos_token_id is neither a token's id nor a list of them")
    return tuple(ids)
