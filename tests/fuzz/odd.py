"""Odd values, and odd bodies made of them."""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from random import Random
from typing import Any

SCALARS = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf")),
    *("", " ", "a", "0", "-1", "1e5", "true", "null", "none", "auto", "base", "user", "system", "assistant", "text"),
    *("json_object", "json_schema", "regex", "tool", "\0", "\ud800", "é\u0301", "😀", "../../etc/passwd", "{{ 7 }}"),
    *("(a|a)*b", "[", "$ref", "#/$defs/a", "http://localhost", "x" * 5000, "\u202e", "a\nb", "%s%n", "<|im_start|>"),
)
NAMES = "a", "type", "text", "content", "role", "function", "name", "schema", "value", "tokens", "", "\0", "$ref", "é"


def odd_value(dice: Random, depth: int = 0) -> Any:
    """Any JSON value, now and then a deep, long or large one."""
    kind = dice.random()
    if depth > 4 or kind < 0.7:
        return dice.choice(SCALARS)
    if kind < 0.72:
        return reduce(lambda inner, _: dice.choice(([inner], {"a": inner})), range(dice.choice((50, 130, 900))), 1)
    if kind < 0.74:
        return [dice.choice(("", "a", 1, None, {}, []))] * dice.choice((100, 5000))
    if kind < 0.86:
        return [odd_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(NAMES): odd_value(dice, depth + 1) for _ in range(dice.randrange(4))}


def changed(value: Any, names: Sequence[str], dice: Random) -> Any:
    """The value with something in it changed: replaced, left out, said twice, or, in an object, added by one of the
    names."""
    match value:
        case dict() if value and dice.random() < 0.85:
            name = dice.choice(list(value))
            match dice.randrange(5):
                case 0:
                    return {**value, dice.choice(names): odd_value(dice)}
                case 1:
                    return {key: other for key, other in value.items() if key != name}
                case _:
                    return {**value, name: changed(value[name], names, dice)}
        case list() if value and dice.random() < 0.85:
            place = dice.randrange(len(value))
            return [*value[:place], *[changed(value[place], names, dice)] * dice.choice((1, 1, 2)), *value[place + 1 :]]
        case _:
            return odd_value(dice)


def odd_form(dice: Random) -> bytes:
    """A multipart/form-data body, with the boundary `a`, rarely cut short."""
    line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": odd_value(dice)})
    contents = b"", b"batch", line.encode(), dice.randbytes(300), (8).to_bytes(8, "little") + b"{}      ", b"{}"
    form = b""
    for _ in range(dice.choice((0, 1, 2, 2, 3, 70))):
        name = dice.choice(("file", "purpose", "expires_after[seconds]", "", "\0", "é", "n" * 300))
        file = dice.choice(("", *("a.jsonl", "adapter_config.json", "adapter_model.safetensors", "../../a", "%00")))
        of_file = f'; filename="{file}"' * bool(file)
        head = f'--a\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n'
        form += head.encode() + dice.choice(contents) + b"\r\n"
    form += b"--a--\r\n"
    return form if dice.random() < 0.8 else form[: dice.randrange(len(form))]


def encoded(value: Any, dice: Random) -> bytes:
    """As JSON, rarely in a broken or unusual form."""
    text = json.dumps(value)
    body = text.encode()
    if dice.random() < 0.85:
        return body
    place = dice.randrange(len(body))
    broken: Mapping[str, bytes] = {
        "cut": body[:place],
        "another byte": body[:place] + bytes([dice.randrange(256)]) + body[place + 1 :],
        "more after its end": body + b"}",
        "twice": body * 2,
        "blanks": b" " * 10_000 + body,
        "a mark": b"\xef\xbb\xbf" + body,
        "other encoding": text.encode(dice.choice(("utf-16", "utf-32", "utf-7"))),
        "lone surrogates": json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"),
        "nothing": b"",
    }
    return dice.choice(list(broken.values()))
