"""Decides which source is asked for an adapter: the one that a request names, or all of them in turn."""

from collections.abc import Sequence
from functools import partial

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.sources.patience import Progress, Report, patiently
from loraplex_shard.lora.sources.protocol import Origin, Source


def refusal(sources: Sequence[Source], id: str, source: str) -> str:
    """Why no source can have an adapter, as far as they know it without asking over the network; empty: one may.
    `source` as in `locate`."""
    asked = [each for each in sources if source in ("", each.name)]
    if not asked:
        return f"{_unknown(source)}; {_known(sources)}"
    reasons = [each.refusal(id) for each in asked]
    return "; ".join(reasons) if all(reasons) else ""


def locate(sources: Sequence[Source], id: str, source: str, revision: str, token: str, report: Report) -> Origin:
    """Finds an adapter's files. `source` is the name of a source, or empty for the first one that has the id. A busy
    source is asked several times: see Progress for what is reported meanwhile.

    Raises the AdapterErrors of the sources. An AdapterNotFoundError has the reasons of all of them.
    """
    progress = Progress(id, source, revision, report)
    asked = [each for each in sources if source in ("", each.name)]
    missing = [] if asked else [_unknown(source)]
    for each in asked:
        if not source and (refusal := each.refusal(id)):
            missing.append(refusal)
            continue
        try:
            return patiently(partial(each.locate, id, revision, token), progress)
        except AdapterNotFoundError as error:
            missing.append(error.message)
        except AdapterSourceError as error:
            raise AdapterSourceError("; ".join([*missing, error.message])) from error
    if not asked or len(sources) == 1:
        missing.append(_known(sources))
    raise AdapterNotFoundError("; ".join(missing))


def _unknown(source: str) -> str:
    return f"this server has no adapter source {quote(source)}"


def _known(sources: Sequence[Source]) -> str:
    names = ", ".join(each.name for each in sources)
    return f"this server's adapter sources are {names} (flags that begin with --adapters add others)"
