"""Where the references in a JSON schema lead."""

from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from loraplex_shard.sampling.schema_tree import Schema, parts


class References:
    """Where a schema's references lead: by JSON pointer or $anchor, from the nearest $id."""

    def __init__(self, schema: Schema) -> None:
        self.nodes: list[Schema] = []
        self._resources = {"": schema}  # by their URI
        self._anchors = dict[str, Schema]()
        self._bases = dict[int, str]()  # the URI of the resource that a schema belongs to, by the schema's id()
        self._read(schema, "")

    def _read(self, node: Schema, base: str) -> None:
        if isinstance(node.get("$id"), str):
            base = urldefrag(urljoin(base, node["$id"])).url
            self._resources.setdefault(base, node)
        if isinstance(node.get("$anchor"), str):
            self._anchors.setdefault(f"{base}#{node['$anchor']}", node)
        self._bases[id(node)] = base
        self.nodes.append(node)
        for part in parts(node):
            self._read(part, base)

    def target(self, node: Schema) -> Schema | None:
        """None if it is not in this document, or is true or false."""
        base, reference = self._bases[id(node)], str(node["$ref"])
        uri, fragment = urldefrag(base + reference if reference.startswith("#") else urljoin(base, reference))
        if fragment and not fragment.startswith("/"):
            return self._anchors.get(f"{uri}#{fragment}")
        found: Any = self._resources.get(uri)
        for step in fragment.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal():
                found = found[int(name)] if int(name) < len(found) else None
            else:
                found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) and id(found) in self._bases else None
