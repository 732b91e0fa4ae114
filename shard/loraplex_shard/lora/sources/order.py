"""Decides which source is asked for an adapter: the one that a request names, or all of them in turn."""

from collections.abc import Sequence
from functools import partial

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.sources.patience import Progress, Report, patiently
from loraplex_shard.lora.sources.protocol import Origin, Source


def locate(sources: Sequence[Source], id: str, source: str, revision: str, token: str, report: Report) -> Origin:
    """Finds an adapter's files. `source` is the name of a source, or empty for the first one that has the id. A busy
    source is asked several times: see Progress for what is reported meanwhile.

    Raises the AdapterErrors of the sources. An AdapterNotFoundError has the reasons of all of them.
    """
    progress = Progress(id, source, revision, report)
    asked = [each for each in sources if source in ("", each.name)]
    missing = [] if asked else [f"this server has no adapter source {quote(source)}"]
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
        names = ", ".join(each.name for each in sources)
        missing.append(f"this server's adapter sources are {names} (flags that begin with --adapters add others)")
    raise AdapterNotFoundError("; ".join(missing))
