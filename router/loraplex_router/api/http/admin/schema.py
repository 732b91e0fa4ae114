"""The JSON of adapter administration. Its fields are those of generation.proto."""

from pydantic import BaseModel, Field

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.vocabulary import references


class AdapterReference(BaseModel):
    """Where an adapter comes from, as in generation.proto."""

    id: str
    source: str = Field(default="", description="One of the server's, as local or hub. Empty: the first that has it.")
    revision: str = Field(default="", description="Branch, tag or commit of a hub repository.")
    token: str = Field(default="", description="For a private hub repository. Never logged.")

    def read(self) -> references.AdapterReference:
        return references.AdapterReference(self.id, self.source, self.revision, self.token)


class AdapterName(BaseModel):
    """An adapter by where it comes from, or by its digest, which is the only name of merged ones."""

    id: str = ""
    source: str = ""
    revision: str = ""
    token: str = ""
    digest: str = Field(default="", description="As in the listing, and then nothing else.")

    def read(self) -> references.AdapterReference | str:
        if self.digest and self.id:
            raise InvalidRequestError(FieldViolation("digest", "give the digest or the id, not both"))
        return self.digest or references.AdapterReference(self.id, self.source, self.revision, self.token)


class Unload(AdapterName):
    wait: bool = Field(
        default=False,
        description="Let the sequences that need it end first, instead of refusing because of them. Requests that come "
        "meanwhile wait, and load it again.",
    )


class AdapterResidence(BaseModel):
    """An adapter in one replica."""

    replica: str
    tier: str
    running_sequences: int
    waiting_sequences: int
    pinned: bool


class AdapterStatus(BaseModel):
    id: str = Field(description="of merged adapters, all of them, separated by commas")
    source: str
    revision: str
    state: str = Field(
        description="available (in the adapter directory), fetching, loaded, unloading, or broken (in the adapter "
        "directory, but it cannot be served)"
    )
    tier: str | None = Field(description="disk, host or device: the fastest place that holds it; null: being fetched")
    digest: str | None = Field(description="null while it is only on disk or being fetched, as are the next two")
    lora_rank: int | None
    size_bytes: int | None
    requests: int = Field(description="that wait or run")
    running_sequences: int
    waiting_sequences: int
    last_used: float | None = Field(description="when a request last came or ended, in seconds since 1970")
    pinned: bool = Field(description="on the device of one replica until it is unpinned or unloaded")
    residences: list[AdapterResidence] = Field(description="the replicas that have it in memory")
    warnings: list[str] = Field(description="what may be wrong with it though it is served")
    reason: str | None = Field(description="why it is broken")
