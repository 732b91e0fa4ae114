"""The objects of a bucket of batches, below its prefix. Each is written as a whole. TENANT is a hash of its name.

| object | what |
| --- | --- |
| files/TENANT/ID.json, contents/TENANT/ID | a file's record and content |
| batches/TENANT/ID.json | a batch's record |
| open/ID, open/ID.cancel | the tenant of a batch that has not ended; a client asks to cancel it |
| expiring/TIME/TENANT/ID | nothing: the file's time is over then, before that of most files |
| parts/ID/... | what a batch has answered so far (`bucket_job.py`) |
| lease | which router runs the batches (`lease.py`) |
| used.json | the bytes of all contents, by TENANT |
| clock | nothing: its date tells the store's time |
"""

from pathlib import PurePosixPath

from loraplex_router.batches.batches import tenant_folder

CONTENTS, OPEN, CANCEL = "contents", "open", ".cancel"
EXPIRING = "expiring"
LEASE, USED, CLOCK = "lease", "used.json", "clock"
FOLDERS = "files", CONTENTS, "batches", OPEN, EXPIRING, "parts"  # whatever else is there belongs to others


def files(tenant: str) -> str:
    return f"files/{tenant_folder(tenant)}"


def file(tenant: str, id: str) -> str:
    return f"{files(tenant)}/{id}.json"


def content(tenant: str, id: str) -> str:
    return f"{CONTENTS}/{tenant_folder(tenant)}/{id}"


def batches(tenant: str) -> str:
    return f"batches/{tenant_folder(tenant)}"


def batch(tenant: str, id: str) -> str:
    return f"{batches(tenant)}/{id}.json"


def open(id: str) -> str:
    return f"{OPEN}/{id}"


def cancel(id: str) -> str:
    return f"{OPEN}/{id}{CANCEL}"


def parts(id: str) -> str:
    return f"parts/{id}"


def expiring(tenant: str, id: str, time: int) -> str:
    return f"{EXPIRING}/{time}/{tenant_folder(tenant)}/{id}"


def expired(path: str, now: int) -> list[str]:
    """Of an object below EXPIRING: the objects of its file, and itself, if their time is over."""
    _, time, folder, id = path.split("/")
    return [path, f"files/{folder}/{id}.json", f"{CONTENTS}/{folder}/{id}"] if int(time) < now else []


def folder_of(path: str) -> str:
    """TENANT, of a content."""
    return path.split("/")[1]


def id_of(path: str) -> str:
    return PurePosixPath(path).stem
