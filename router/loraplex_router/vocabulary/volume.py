"""Limits on what the router must keep for one call, over all of its prompts and answers."""

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.vocabulary.request import Request

MAX_PROMPT_TOKENS = 2**22  # eight bytes each, per answer
MAX_LOGPROBS = 2**19  # alternatives included: some 200 bytes each, with their text
MAX_SCORES = 2**22  # of classifiers: one per label, of each text or token


class Volume:
    """Adds up the requests of one call."""

    def __init__(self) -> None:
        self._prompt_tokens = self._logprobs = self._scores = 0

    def add_scores(self, count: int) -> None:
        """Raises InvalidRequestError if the call exceeds the limit."""
        self._scores += count
        if self._scores > MAX_SCORES:
            many = f"{self._scores} scores are requested: at most {MAX_SCORES}, send fewer inputs"
            raise InvalidRequestError(FieldViolation("inputs", many))

    def add(self, request: Request, prompt_length: int, room: int) -> int:
        """Maximum number of tokens per answer, at most `room`: fewer if the caller set no limit and asked for logprobs.
        Raises InvalidRequestError if the call exceeds the limits."""
        detail = request.detail
        self._prompt_tokens += request.n * prompt_length
        if self._prompt_tokens > MAX_PROMPT_TOKENS:
            many = f"{self._prompt_tokens} tokens in total, each counted once per answer"
            raise InvalidRequestError(FieldViolation("prompt", f"{many}: at most {MAX_PROMPT_TOKENS}"))
        if detail.prompt_logprobs:
            self._logprobs += request.n * prompt_length * (1 + detail.prompt_top_logprobs)
        if detail.logprobs:
            of_token = request.n * (1 + detail.top_logprobs)
            if request.max_new_tokens is None:
                room = max(1, min(room, (MAX_LOGPROBS - self._logprobs) // of_token))
            self._logprobs += room * of_token
        if self._logprobs > MAX_LOGPROBS:
            many = f"{self._logprobs} are requested, over all tokens, answers and alternatives: at most {MAX_LOGPROBS}"
            raise InvalidRequestError(FieldViolation("logprobs", many))
        return room
