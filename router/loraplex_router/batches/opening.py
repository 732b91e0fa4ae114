"""Opens what --batches names."""

from pathlib import Path

from loraplex_router.batches.batches import Batches
from loraplex_router.batches.folder import BatchFolder


def open_batches(where: str, most_bytes: int) -> Batches:
    """`where`: a folder or a bucket's URL. Raises OSError that names the flag."""
    if "://" not in where:
        return BatchFolder(Path(where), most_bytes)
    from loraplex_router.batches.bucket import BatchBucket  # routers without it start faster

    try:
        return BatchBucket(where, most_bytes)
    except ValueError as error:
        raise OSError(f"--batches: {where}: {error}") from error
