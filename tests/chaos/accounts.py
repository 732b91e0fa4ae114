"""What processes hold: memory, descriptors, threads, tasks, series."""

import psutil

from tests.chaos.cluster import Cluster, Place

MIB = 2**20
# By how much each may grow: connections and requests come and go, allocators keep some memory, and a rank's pool starts
# its 64 threads as it needs them.
SLACK = {"MiB": 60, "descriptors": 10, "threads": 64, "tasks": 40, "series": 400}

Holdings = dict[str, dict[str, float]]  # by process


def holdings(cluster: Cluster) -> Holdings:
    routers = {f"router {number}": _of_router(place) for number, place in enumerate(cluster.places)}
    ranks = {f"rank {number}": psutil.Process(pid) for number, pid in enumerate(cluster.ranks.pids())}
    stagers = {f"stager of {name}": rank.children()[0] for name, rank in ranks.items()}
    return routers | {name: _of(process) for name, process in (ranks | stagers).items()}


def growth(before: Holdings, after: Holdings) -> list[str]:
    """What has grown by more than it may, in words."""
    return [
        f"{process}: {found:.0f} {name}, before {before[process][name]:.0f}"
        for process, held in after.items()
        for name, found in held.items()
        if found > before[process][name] + SLACK[name]
    ]


def _of(process: psutil.Process) -> dict[str, float]:
    return {
        "MiB": process.memory_info().rss / MIB,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def _of_router(place: Place) -> dict[str, float]:
    router = place.router
    of_loop = {"tasks": router.metric("loraplex_tasks"), "series": len(router.metrics().splitlines())}
    return _of(psutil.Process(router.process.pid)) | of_loop
