"""Adapters in S3, or in a store that speaks like it: an id is a folder's name under one bucket and prefix.

Credentials, region and endpoint are the server's, found as every AWS program finds them (AWS_* variables, a pod's
role, ...). They appear in no message.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from loraplex_protos.adapter_names import RULE, is_name
from loraplex_protos.errors import AdapterError, AdapterForbiddenError, AdapterNotFoundError, AdapterSourceError, quote
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS, AdapterFiles, assemble, check_names, check_size
from loraplex_shard.lora.sources.text_files import NAMED_TEMPLATES, TEXT_FILES, text_files

_CHUNK = 2**24
_MOST_LISTED = 10_000


@dataclass(frozen=True, slots=True)
class S3Origin:
    """One state of one adapter's objects. Equal origins have equal contents."""

    id: str
    bucket: str
    folder: str
    etags: tuple[tuple[str, str], ...]  # of the files by name
    client: Any = field(repr=False, compare=False)

    @property
    def source(self) -> str:
        return "s3"

    @property
    def revision(self) -> str:
        return ""

    def fetch(self) -> int:
        with _typed_errors(self.id):
            answer = self.client.head_object(Bucket=self.bucket, Key=f"{self.folder}/{TENSORS}")
        return int(answer["ContentLength"])

    def read(self) -> AdapterFiles:
        return assemble({name: self._get(name, etag) for name, etag in self.etags})

    def _get(self, name: str, etag: str) -> bytearray:
        with _typed_errors(self.id):
            answer = self.client.get_object(Bucket=self.bucket, Key=f"{self.folder}/{name}", IfMatch=etag)
            check_size(name, answer["ContentLength"])
            data = bytearray()
            for chunk in answer["Body"].iter_chunks(_CHUNK):
                data += chunk
            return data


class _State(NamedTuple):
    """Of an object."""

    etag: str
    size: int


class S3Source:
    """The adapters under `url`, s3://BUCKET or s3://BUCKET/PREFIX."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        config = Config(connect_timeout=timeout_s, read_timeout=timeout_s, retries={"total_max_attempts": 3})
        self._client = boto3.client("s3", config=config)

    def locate(self, id: str, revision: str) -> S3Origin:
        """Asks for the state of its objects.

        Raises AdapterNotFoundError, AdapterForbiddenError, AdapterSourceError, and AdapterInvalidError for a folder
        that holds no adapter or too large a one.
        """
        if revision:
            raise AdapterNotFoundError(f"{quote(id)} is looked for in S3, where there are no revisions")
        if not is_name(id):
            raise AdapterNotFoundError(f"{quote(id)} cannot be an adapter's name: {RULE}")
        folder = f"{self._prefix}{id}"
        with _typed_errors(id):
            found = self._find(folder)
        if not found:
            raise AdapterNotFoundError(f"S3 has no adapter {quote(id)}")
        check_names(frozenset(found))
        names = (CONFIG, TENSORS, *text_files(found))
        for name in names:
            check_size(name, found[name].size)
        return S3Origin(id, self._bucket, folder, tuple((name, found[name].etag) for name in names), self._client)

    def _find(self, folder: str) -> dict[str, _State]:
        """The objects of an adapter's folder, by name."""
        try:
            found = self._list(f"{folder}/")
        except ClientError as error:
            if _status(error) != 403:
                raise
            return self._ask(folder)
        named = {
            f"{NAMED_TEMPLATES}/{name}": state for name, state in self._list(f"{folder}/{NAMED_TEMPLATES}/").items()
        }
        return found | named

    def _list(self, prefix: str) -> dict[str, _State]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=prefix, Delimiter="/", PaginationConfig={"MaxItems": _MOST_LISTED}
        )
        objects = (object for page in pages for object in page.get("Contents", ()))
        return {object["Key"].removeprefix(prefix): _State(object["ETag"], object["Size"]) for object in objects}

    def _ask(self, folder: str) -> dict[str, _State]:
        """Where the server may read the bucket, but not list it: then nothing is known of named templates, and what is
        not there cannot be told from what it may not read."""
        found, optional = {}, (PICKLE, *TEXT_FILES)
        for name in (CONFIG, TENSORS, *optional):
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=f"{folder}/{name}")
            except ClientError as error:
                if _status(error) != 404 and not (name in optional and _status(error) == 403):
                    raise
            else:
                found[name] = _State(answer["ETag"], answer["ContentLength"])
        return found


@contextmanager
def _typed_errors(id: str) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except ClientError as error:
        raise _from_status(id, _status(error)) from error
    except (BotoCoreError, OSError) as error:  # no connection, a timeout, no credentials
        raise AdapterSourceError(f"S3 did not hand over {quote(id)}: {type(error).__name__}") from error


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _from_status(id: str, status: int) -> AdapterError:
    match status:
        case 403:
            return AdapterForbiddenError(
                f"S3 does not let this server read {quote(id)}; without the right to list the bucket it says so of what"
                " is not there, too"
            )
        case 404:
            return AdapterNotFoundError(f"S3 has no adapter {quote(id)}, or no such bucket")
        case 412:
            return AdapterSourceError(f"the files of {quote(id)} changed while they were read: try again")
        case _:
            return AdapterSourceError(f"S3 answered {status} for {quote(id)}")
