"""Where a JSON object ends in a text that arrives in pieces. Knows nothing of what is in it."""


class ObjectEnd:
    """Finds the bracket that closes an object, or what else was opened first; `depth` of them are open already.

    Looks at each character once, and does not mind text that is no JSON.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int | None:
        """The place in `text` behind that bracket, or None if it is still to come. Not to be called after that."""
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
