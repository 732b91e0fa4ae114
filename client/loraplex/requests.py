"""Protobuf requests from callers' values. Checks only the fields' names and types; the server checks the rest."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Any, TypeVar, Unpack, cast

from google.protobuf.message import Message as Proto

from loraplex.grammars import Grammar, to_proto
from loraplex.options import AdapterReference, GenerateOptions, MergedAdapters, Message, Prompt
from loraplex.tools import AnyTool, Tool, read_tools
from loraplex.types import ToolCall
from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import FieldViolation, InvalidRequestError

ADAPTERS_AT_A_TIME = 1000  # of a listing
UPLOAD_PART = 2**19  # bytes of a message

_TOOL_MODES = {
    "auto": pb.ToolChoice.MODE_UNSPECIFIED,
    "none": pb.ToolChoice.MODE_NONE,
    "required": pb.ToolChoice.MODE_REQUIRED,
}

P = TypeVar("P", bound=Proto)
R = TypeVar("R", pb.GenerateRequest, pb.EmbedInput)
S = TypeVar("S", pb.GenerateRequest, pb.EmbedRequest, pb.ClassifyRequest)
A = TypeVar("A", pb.UnloadAdapterRequest, pb.PinAdapterRequest, pb.UnpinAdapterRequest)


def generate_request(prompt: Prompt, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """Options have the names of the messages' fields. Raises TypeError for an unknown option."""
    given: dict[str, Any] = dict(options)
    adapter, grammar, adapters = (given.pop(name, None) for name in ("adapter", "grammar", "adapters"))
    tools, tool_choice = given.pop("tools", None), given.pop("tool_choice", None)
    single = given.pop("parallel_tool_calls", True) is False
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    request = pb.GenerateRequest(sampling=pb.Sampling(), stopping=pb.Stopping(), detail=pb.Detail())
    _fill(request, n=given.pop("n", 1), background=given.pop("background", False))
    _fill(request, **{name: given.pop(name, "") for name in ("request_id", "cache_salt", "session")})
    parts: tuple[Proto, ...] = (request.sampling, request.stopping, request.detail)
    for part in parts:
        _fill(part, **{name: given.pop(name) for name in part.DESCRIPTOR.fields_by_name if name in given})
    if given:
        raise TypeError(f"unknown option: {', '.join(map(_unknown, given))}")
    if grammar is not None:
        request.grammar.CopyFrom(_grammar(grammar))
    _with_adapter(request, adapter)
    if adapters is not None:
        named = [adapters] if isinstance(adapters, str) else adapters
        _fill(request, adapters=[adapter_reference("" if each is None else each) for each in named])
    _with_prompt(request, prompt)
    _add_tools(request, tools)
    if single or tool_choice not in (None, "auto"):
        request.tool_choice.CopyFrom(_fill(_tool_choice(tool_choice), single=single))
    return request


def _unknown(option: str) -> str:
    meant = get_close_matches(option, GenerateOptions.__annotations__, 1)
    return f"{option} ({meant[0]}?)" if meant else option


def _add_tools(request: pb.GenerateRequest | pb.TokenizeRequest, tools: Sequence[AnyTool] | None) -> None:
    if tools:
        if not request.HasField("chat"):
            raise InvalidRequestError(FieldViolation("tools", "needs a conversation as the prompt"))
        request.chat.tools.extend(map(_tool, read_tools(tools)))


def _tool(tool: Tool) -> pb.Tool:
    parameters = "" if tool.parameters is None else json.dumps(tool.parameters, ensure_ascii=False)
    description = tool.description or None
    return _fill(pb.Tool(), name=tool.name, description=description, parameters=parameters, strict=tool.strict)


def _tool_choice(choice: str | None) -> pb.ToolChoice:
    if choice is None:
        return pb.ToolChoice()
    if not isinstance(choice, str):
        raise InvalidRequestError(FieldViolation("tool_choice", "is auto, none, required, or the name of a tool"))
    mode = _TOOL_MODES.get(choice)
    return pb.ToolChoice(name=choice) if mode is None else pb.ToolChoice(mode=mode)


def embed_request(
    inputs: str | Sequence[Prompt], adapter: str | AdapterReference | MergedAdapters | None, session: str = ""
) -> pb.EmbedRequest:
    return _with_adapter(_fill(pb.EmbedRequest(inputs=_inputs(inputs)), session=session), adapter)


def classify_request(
    inputs: str | Sequence[Prompt],
    adapter: str | AdapterReference | MergedAdapters | None,
    raw_logits: bool,
    session: str = "",
) -> pb.ClassifyRequest:
    request = pb.ClassifyRequest(inputs=_inputs(inputs), raw_logits=raw_logits)
    return _with_adapter(_fill(request, session=session), adapter)


def tokenize_request(
    prompt: str | Sequence[Message], skip_special_tokens: bool, tools: Sequence[AnyTool] | None = None
) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(skip_special_tokens=skip_special_tokens)
    request = _fill(request, text=prompt) if isinstance(prompt, str) else _fill(request, chat=_chat(prompt))
    _add_tools(request, tools)
    return request


def adapter_reference(adapter: str | AdapterReference) -> pb.AdapterReference:
    """Raises InvalidRequestError for anything else."""
    if isinstance(adapter, str):
        adapter = AdapterReference(adapter)
    if not isinstance(adapter, AdapterReference):
        reason = "is a name or an AdapterReference; several answer by `adapters`, or merged as MergedAdapters"
        raise InvalidRequestError(FieldViolation("adapter", reason))
    return _fill(
        pb.AdapterReference(),
        id=adapter.id,
        source=adapter.source,
        revision=adapter.revision,
        token=adapter.token,
    )


def _inputs(inputs: str | Sequence[Prompt]) -> list[pb.EmbedInput]:
    return [_with_prompt(pb.EmbedInput(), prompt) for prompt in ([inputs] if isinstance(inputs, str) else inputs)]


def _with_prompt(request: R, prompt: Prompt) -> R:
    if isinstance(prompt, str):
        return _fill(request, text=prompt)
    if not isinstance(prompt, Sized) or isinstance(prompt, Mapping | bytes):
        kind = type(prompt).__name__
        reason = f"has the type {kind}: send a text, a list of messages or a list of token ids"
        raise InvalidRequestError(FieldViolation("prompt", reason))
    if _is_chat(prompt):
        return _fill(request, chat=_chat(cast(Sequence[Message], prompt)))
    return _fill(request, token_ids=_fill(pb.TokenIds(), ids=prompt))


def upload_parts(
    name: str, files: Mapping[str, bytes], expected_version: int | None
) -> Iterator[pb.UploadAdapterRequest]:
    """The messages of an upload."""
    sizes = [pb.UploadedFile(name=file, size_bytes=len(data)) for file, data in files.items()]
    header = _fill(pb.UploadHeader(name=name, files=sizes), expected_version=expected_version)
    yield pb.UploadAdapterRequest(header=header)
    for data in files.values():
        for start in range(0, len(data), UPLOAD_PART):
            yield pb.UploadAdapterRequest(data=data[start : start + UPLOAD_PART])


def alias_request(name: str, targets: Mapping[str, float], expected: Mapping[str, float] | None) -> pb.SetAliasRequest:
    request = pb.SetAliasRequest(name=name, targets=_targets(targets))
    return request if expected is None else _fill(request, expected=pb.AliasTargets(targets=_targets(expected)))


def _targets(targets: Mapping[str, float]) -> list[pb.AliasTarget]:
    return [_fill(pb.AliasTarget(adapter=target), percent=percent) for target, percent in targets.items()]


def name_adapter(request: A, reference: AdapterReference, digest: str) -> A:
    """Sets the reference or the digest. Raises InvalidRequestError if both or neither are given."""
    if bool(reference.id) == bool(digest):
        raise InvalidRequestError(FieldViolation("digest", "give either an id or a digest"))
    return _fill(request, digest=digest) if digest else _fill(request, adapter=adapter_reference(reference))


def _with_adapter(request: S, adapter: str | AdapterReference | MergedAdapters | None) -> S:
    if isinstance(adapter, MergedAdapters):
        return _fill(request, merged_adapters=_merged_adapters(adapter))
    return request if adapter is None else _fill(request, adapter=adapter_reference(adapter))


def _merged_adapters(merged: MergedAdapters) -> pb.MergedAdapters:
    return _fill(
        pb.MergedAdapters(),
        adapters=[adapter_reference(adapter) for adapter in merged.adapters],
        weights=merged.weights,
        strategy=merged.strategy,
        density=merged.density,
        majority_sign_method=merged.majority_sign_method,
    )


def cancel_request(request_id: str) -> pb.CancelGenerationRequest:
    return _fill(pb.CancelGenerationRequest(), request_id=request_id)


def _grammar(grammar: Grammar) -> pb.Grammar:
    try:
        return to_proto(grammar)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(FieldViolation("grammar", str(error))) from error


def _is_chat(prompt: Sequence[int] | Sequence[Message]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _chat(messages: Sequence[Message]) -> pb.Chat:
    return pb.Chat(messages=map(_message, messages))


def _message(message: Message) -> pb.ChatMessage:
    if not isinstance(message, Mapping):
        reason = f"one has the type {type(message).__name__}: each is a dictionary with a role and content"
        raise InvalidRequestError(FieldViolation("messages", reason))
    fields = dict(message)
    calls = fields.pop("tool_calls", None) or ()
    if "reasoning_content" in fields:  # its name in other servers' answers
        fields.setdefault("reasoning", fields.pop("reasoning_content"))
    return _fill(pb.ChatMessage(), **fields, tool_calls=map(_tool_call, calls))


def _tool_call(call: ToolCall | Mapping[str, Any]) -> pb.ToolCall:
    """From OpenAI's form, too."""
    if isinstance(call, ToolCall):
        return pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
    return _fill(pb.ToolCall(), id=call.get("id"), **call.get("function", {}))


def _fill(proto: P, /, **values: object) -> P:
    """Sets the fields whose value is not None. Raises InvalidRequestError, naming the field, for a value that does not
    fit."""
    for name, value in values.items():
        if value is not None:
            try:
                proto.MergeFrom(type(proto)(**{name: value}))
            except (TypeError, ValueError) as error:
                why = str(error)
                if why == "bad argument type for built-in operation":  # protobuf's for what is not a text
                    why = f"{reprlib.repr(value)} is not a text, or has something else than texts"
                raise InvalidRequestError(FieldViolation(name, why)) from error
    return proto
