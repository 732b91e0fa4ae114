"""Finds the end of a JSON object in a text that arrives in pieces, whatever its content."""


class ObjectEnd:
    """Finds the bracket that closes the outermost object or list; `depth` brackets are open already.

    Scans each character once, and tolerates text that is not JSON.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int | None:
        """The index in `text` after that bracket, or None if it has not arrived. Must not be called again after it
        has."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None
