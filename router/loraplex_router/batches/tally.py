"""Counts what a batch has answered."""

from typing import Any

from loraplex_router.batches.records import Counts, Usage

Row = dict[str, Any]  # a line of an output or error file


class Tally:
    def __init__(self) -> None:
        self.done = set[str]()  # custom_ids
        self._completed = self._failed = 0
        self.usage = Usage()

    def add(self, row: Row, failed: bool) -> bool:
        """False, and nothing is counted, if the same line has been added before."""
        if row["custom_id"] in self.done:
            return False
        self.done.add(row["custom_id"])
        if failed:
            self._failed += 1
        else:
            self._completed += 1
        used = ((row["response"] or {}).get("body") or {}).get("usage") or {}
        usage = self.usage
        given = used.get("prompt_tokens", used.get("input_tokens", 0))
        made = used.get("completion_tokens", used.get("output_tokens", 0))
        cached = used.get("prompt_tokens_details") or used.get("input_tokens_details") or {}
        thought = used.get("completion_tokens_details") or used.get("output_tokens_details") or {}
        usage.input_tokens += given
        usage.output_tokens += made
        usage.total_tokens += given + made
        usage.input_tokens_details.cached_tokens += cached.get("cached_tokens") or 0
        usage.output_tokens_details.reasoning_tokens += thought.get("reasoning_tokens") or 0
        return True

    def counts(self, total: int) -> Counts:
        return Counts(total=total, completed=self._completed, failed=self._failed)
