"""The JSON of adapter administration. Its fields are those of generation.proto."""

from pydantic import BaseModel, Field

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.vocabulary import references


class AdapterReference(BaseModel):
    """Where an adapter comes from, as in generation.proto."""

    id: str
    source: str = Field(default="", description="Where it is, for example local. Empty: the first that has it.")
    revision: str = Field(default="", description="Branch, tag or commit of a hub repository.")
    token: str = Field(default="", description="For a private hub repository. Never logged.")

    def reference(self) -> references.AdapterReference:
        return references.AdapterReference(self.id, self.source, self.revision, self.token)


class AdapterName(AdapterReference):
    """An adapter, named by its source or by its digest. A merged adapter has only its digest."""

    id: str = ""
    digest: str = Field(default="", description="As listed. Give either this or the id.")

    def name(self) -> references.AdapterReference | str:
        if self.digest and self.id:
            raise InvalidRequestError(FieldViolation("digest", "give the digest or the id, not both"))
        return self.digest or self.reference()


class Unload(AdapterName):
    wait: bool = Field(
        default=False,
        description="Wait for the sequences that need it, instead of refusing. New requests wait and load it again.",
    )


class Register(AdapterReference):
    name: str = Field(description="The name that requests will use.")
    expected_version: int | None = Field(
        default=None, ge=0, lt=2**63, description="The version that it must have now; 0: none. Absent: any."
    )


class Alias(BaseModel):
    name: str
    targets: dict[str, float] = Field(description="Names or versions, and their shares, together 100 per cent.")
    expected: dict[str, float] | None = Field(
        default=None, description="What it must stand for now; empty: nothing. Absent: anything."
    )


class Remove(BaseModel):
    name: str = Field(description="Of an uploaded adapter, or in the registry file.")
    expected_version: int | None = Field(
        default=None, ge=0, lt=2**63, description="The version that it must have now. Absent: any."
    )


class AdapterResidence(BaseModel):
    """An adapter in one replica."""

    replica: str
    tier: str
    running_sequences: int
    waiting_sequences: int
    pinned: bool


class Classifier(BaseModel):
    """The linear layer on the last hidden states that classifies."""

    of_tokens: bool = Field(description="It classifies each token, not the text as a whole.")
    labels: list[str]
    activation: str = Field(description="What makes scores of its logits: softmax, sigmoid or none.")
    joins_pairs: bool = Field(description="It reads a pair of texts as one, the second directly behind the first.")


class AliasTarget(BaseModel):
    adapter: str = Field(description="A version (name@version), a registered name, or another alias.")
    percent: float = Field(description="The share of sessions that get it.")


class AdapterStatus(BaseModel):
    id: str = Field(description="For a merged adapter, the ids of its parts, separated by commas.")
    source: str
    revision: str
    state: str = Field(
        description="available (in the adapter directory or, of the registry, fetched to disk), fetching, loaded, "
        "unloading, or broken (in the adapter directory, but it cannot be served); of the registry: registered (a "
        "version that is not fetched yet), failed (a version that cannot be fetched or served) or alias (a name for "
        "`targets`)"
    )
    tier: str | None = Field(description="The fastest place that has it: disk, host or device. null: being fetched.")
    digest: str | None = Field(description="null while it is only on disk or being fetched, like the next two.")
    lora_rank: int | None
    size_bytes: int | None
    requests: int = Field(description="How many requests wait or run.")
    running_sequences: int
    waiting_sequences: int
    last_used: float | None = Field(description="When a request last arrived or ended, in seconds since 1970.")
    pinned: bool = Field(description="Whether it stays on the device of one replica until it is unpinned or unloaded.")
    residences: list[AdapterResidence] = Field(description="The replicas that have it in memory.")
    warnings: list[str] = Field(description="What may be wrong with it. It is served all the same.")
    reason: str | None = Field(description="Why it is broken, has failed, or is not fetched yet.")
    fetched_bytes: int | None = Field(description="How much of it is on disk while it is fetched. null: not known.")
    total_bytes: int | None = Field(description="How much of it there is, while it is fetched. null: not known.")
    invocation: str = Field(description="What in a prompt activates it (aLoRA). Empty: it is always active.")
    invocation_token_ids: list[int] = Field(description="The same as tokens.")
    classifier: Classifier | None = Field(description="Its own, if it was trained to classify; known once loaded.")
    targets: list[AliasTarget] = Field(description="Of an alias: what it stands for.")
