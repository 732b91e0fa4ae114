"""From LoRAX's JSON to the router's request."""

from loraplex_router.api.http.call import Call
from loraplex_router.api.http.lorax.schema import GenerateRequest, Parameters
from loraplex_router.api.http.response_format import read_response_format
from loraplex_router.api.http.unknown_fields import unknown_fields
from loraplex_router.vocabulary.chat import Chat, Message
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Detail
from loraplex_router.vocabulary.violations import Violations


def read_request(body: GenerateRequest, bearer: str, stream: bool) -> Request:
    """`bearer`: the token of the Authorization header, or empty. Raises InvalidRequestError."""
    given = body.parameters or Parameters()
    _check(body, given, stream)
    alternatives = given.return_k_alternatives or given.top_n_tokens or 0
    return Request(
        prompt=Chat((Message("user", body.inputs),)) if given.apply_chat_template else body.inputs,
        adapter=read_adapter(given, bearer),
        sampling=_read_sampling(given),
        max_new_tokens=given.max_new_tokens,
        stop=tuple(given.stop or ()),
        include_stop=True,
        ignore_eos=bool(given.ignore_eos_token),
        truncate=given.truncate,
        n=given.best_of or 1,
        grammar=_read_format(given),
        warnings=unknown_fields(body, given),
        detail=Detail(
            logprobs=stream or wants_details(given) or (given.best_of or 1) > 1,
            top_logprobs=alternatives,
            prompt_logprobs=bool(given.decoder_input_details),
        ),
    )


def adapter_token(call: Call) -> str:
    """LoRAX's clients send an adapter's token as Authorization, unless this server takes API keys."""
    return "" if call.service.keys.required else call.key or ""


def wants_details(given: Parameters) -> bool:
    return bool(given.details or given.decoder_input_details)


def read_adapter(given: Parameters, bearer: str) -> AdapterReference | MergedReference | None:
    def named(name: str) -> AdapterReference:
        return AdapterReference(name, given.adapter_source or "", token=given.api_token or bearer)

    if merged := given.merged_adapters:
        return MergedReference(
            tuple(named(name) for name in merged.ids),
            tuple(merged.weights),
            merged.merge_strategy or "linear",
            1.0 if merged.density is None else merged.density,
            merged.majority_sign_method or "total",
        )
    return named(given.adapter_id) if given.adapter_id else None


def _read_format(given: Parameters) -> Grammar | None:
    if given.response_format:
        return read_response_format(given.response_format, "response_format")
    return read_response_format(given.grammar, "grammar") if given.grammar else None


def _read_sampling(given: Parameters) -> Sampling:
    """As in LoRAX, decoding is greedy unless do_sample or an option that only affects sampling is set. A top_p or
    typical_p of 1 keeps all tokens, so it counts as absent."""
    defaults = {"temperature": 1.0} if given.do_sample else {}
    sampling = defaults | given.given
    for name in ("top_p", "typical_p"):
        if sampling.get(name) == 1:
            del sampling[name]
    return Sampling(**sampling)


def _check(body: GenerateRequest, given: Parameters, stream: bool) -> None:
    """Refuses what only LoRAX refuses; the rest is checked for all faces."""
    found = Violations()
    found.check(bool(body.inputs), "inputs", "cannot be empty")
    both = given.adapter_id and given.merged_adapters
    found.check(not both, "adapter_id", "cannot be given together with merged_adapters")
    found.check(not given.watermark, "watermark", "is not supported: leave it out or set it to false")
    found.check(given.best_of != 0, "best_of", "must be > 0")
    found.check(given.return_k_alternatives != 0, "return_k_alternatives", "must be strictly positive")
    if (given.best_of or 1) > 1:
        greedy = _read_sampling(given).resolve().temperature == 0
        found.check(not greedy, "best_of", "needs sampling: set do_sample or temperature")
        found.check(given.seed is None, "seed", "must not be set when best_of > 1")
        found.check(not stream, "best_of", "!= 1 is not supported when streaming tokens")
    streams_details = stream and given.decoder_input_details
    found.check(not streams_details, "decoder_input_details", "== true is not supported when streaming tokens")
    found.raise_any()
