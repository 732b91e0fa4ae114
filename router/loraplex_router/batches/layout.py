"""The objects of a bucket of batches, below its prefix. Each is written as a whole. TENANT is a hash of its name.

| object | what |
| --- | --- |
| files/TENANT/ID.json, contents/TENANT/ID | a file's record and content |
| batches/TENANT/ID.json | a batch's record |
| open/ID, open/ID.cancel | the tenant of a batch that has not ended; a client asks to cancel it |
| parts/ID/... | what a batch has answered so far (`bucket_job.py`) |
| lease | which router runs the batches (`lease.py`) |
| used | the bytes of all contents |
| clock | nothing: its date tells the store's time |
"""

from loraplex_router.batches.batches import tenant_folder

CONTENTS, OPEN, CANCEL = "contents", "open", ".cancel"
LEASE, USED, CLOCK = "lease", "used", "clock"
FOLDERS = "files", CONTENTS, "batches", OPEN, "parts"  # whatever else is there belongs to others


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
