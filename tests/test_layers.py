"""Imports point downwards: which package may import which others. ARCHITECTURE.md says why."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "loraplex_protos": ROOT / "protos/loraplex_protos",
    "loraplex_router": ROOT / "router/loraplex_router",
    "loraplex_shard": ROOT / "shard/loraplex_shard",
    "loraplex": ROOT / "client/loraplex",
    "loraplex_command": ROOT / "client/loraplex_command",
}

# Which of our packages a package may import, besides its own modules.
MAY_IMPORT: dict[str, set[str]] = {
    "loraplex_protos": set(),
    "loraplex_router": {"loraplex_protos"},
    "loraplex_shard": {"loraplex_protos"},
    "loraplex": {"loraplex_protos"},
    "loraplex_command": {"loraplex"},
    # The commands that run services are the only place where everything meets.
    "loraplex.cli": {"loraplex", "loraplex_command", "loraplex_protos", "loraplex_router", "loraplex_shard"},
    # Pure policy: no clock, no transport.
    "loraplex_router.engine.blocks": set(),
    "loraplex_router.engine.pool": {"loraplex_router.vocabulary", "loraplex_protos.errors"},
    "loraplex_router.engine.scheduler": {
        f"loraplex_router.engine.{name}"
        for name in ("blocks", "fairness", "places", "pool", "prefixes", "prompt_budget", "queues", "slots", "turns")
    }
    | {"loraplex_router.vocabulary"},
    "loraplex_router.engine.turns": {
        f"loraplex_router.engine.{name}" for name in ("fairness", "places", "queues", "slots")
    }
    | {"loraplex_router.vocabulary"},
    "loraplex_router.engine.slots": {
        f"loraplex_router.engine.{name}" for name in ("entitlement", "fairness", "places", "pool", "queues")
    }
    | {"loraplex_router.vocabulary"},
    "loraplex_router.engine.places": {f"loraplex_router.engine.{name}" for name in ("blocks", "kv_shares", "prefixes")}
    | {"loraplex_router.vocabulary"},
    "loraplex_router.engine.pace": set(),
    "loraplex_router.engine.entitlement": {f"loraplex_router.engine.{name}" for name in ("fairness", "pool", "queues")}
    | {"loraplex_router.vocabulary"},
    "loraplex_router.engine.prefixes": {"loraplex_router.engine.blocks", "loraplex_router.vocabulary"},
    "loraplex_router.engine.prompt_budget": {"loraplex_router.engine.fairness", "loraplex_router.vocabulary"},
    "loraplex_router.engine.queues": {"loraplex_router.vocabulary"},
    "loraplex_router.engine.fairness": {"loraplex_router.vocabulary"},
    "loraplex_router.engine.kv_shares": {"loraplex_router.vocabulary"},
    "loraplex_router.engine.suspects": {"loraplex_router.vocabulary"},
    "loraplex_router.engine.replay": {"loraplex_router.vocabulary", "loraplex_protos"},
    "loraplex_router.replicas.placement": {"loraplex_router.vocabulary"},
    "loraplex_router.wire.pulse": {"loraplex_protos"},
    # The shard's lowest floor.
    "loraplex_shard.device.memory": set(),
    "loraplex_shard.sampling.draws": {"loraplex_shard.device.copies"},
    "loraplex_shard.sampling.few_rows": set(),
    "loraplex_shard.sampling.stages": {
        "loraplex_protos",
        "loraplex_shard.device.copies",
        "loraplex_shard.sampling.few_rows",
    },
    "loraplex_shard.sampling.cuda": {"loraplex_shard.device.copies", "loraplex_shard.sampling.draws"},
    "loraplex_shard.sampling.sampler": {
        f"loraplex_shard.sampling.{name}" for name in ("cuda", "draws", "few_rows", "stages")
    },
    "loraplex_shard.shapes.layout": set(),
    "loraplex_shard.shapes.adapter": {
        "loraplex_shard.device.memory",
        "loraplex_shard.kernels.tables",
        "loraplex_shard.shapes.classifier",
        "loraplex_shard.shapes.own_weights",
    },
    "loraplex_shard.shapes.own_weights": {"loraplex_shard.kernels.tables"},
    "loraplex_shard.shapes.classifier": set(),
    "loraplex_shard.ops.quantized": set(),
    # A source finds and reads files, but does not interpret them.
    "loraplex_shard.lora.sources": {"loraplex_protos", "loraplex_shard.sampling.defaults"},
    "loraplex_shard.sampling.defaults": set(),
    "loraplex_shard.lora.weights": {
        "loraplex_protos",
        "loraplex_shard.device.memory",
        "loraplex_shard.lora.sources.text_files",
        "loraplex_shard.shapes",
    },
}

# The only packages that may import the top floors.
IMPORTED_BY: dict[str, set[str]] = {
    "loraplex_router.app": {"loraplex.cli"},
    "loraplex_shard.serving.server": {"loraplex.cli"},
    "loraplex_shard.serving.service": {"loraplex_shard.serving.server"},
    "loraplex_shard.stepping.runner": {
        "loraplex_shard.serving.server",
        "loraplex_shard.serving.sizing",
        "loraplex_shard.serving.steps",
    },
}

# The floors of router and shard, lowest first: packages only import from lower floors, and not from packages on the
# same floor.
FLOORS = {
    "loraplex_router": (
        {"vocabulary", "store", "fair_slots", "loops"},
        {"text", "wire", "access"},
        {"engine", "settings"},
        {"adapters"},
        {"replicas"},
        {"journal"},
        {"usage"},
        {"telemetry", "batches"},
        {"service"},
        {"api"},
        {"app"},
    ),
    "loraplex_shard": (
        {"kernels", "settings"},
        {"device", "observation"},
        {"sampling"},
        {"shapes"},
        {"ops"},
        {"checkpoint"},
        {"layers", "lora"},
        {"models"},
        {"stepping"},
        {"serving"},
    ),
}

# The folders of HTTP's faces.
FACES = sorted(path.parent.name for path in (PACKAGES["loraplex_router"] / "api/http").glob("*/__init__.py"))

# Heavy or optional packages, and who may import them.
FOREIGN = {
    "torch": {"loraplex_shard", "loraplex.cli"},
    "transformers": {"loraplex_shard", "loraplex_router.text.template"},
    "fastapi": {"loraplex_router.api"},
    "redis": {"loraplex_router.store"},
    "obstore": {"loraplex_protos.object_stores", "loraplex_router.batches", "loraplex_shard.lora.sources"},
}


def _modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            if "_pb2" not in path.name:
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                yield ".".join(parts).removesuffix(".__init__"), path


def _imports(path: Path) -> set[str]:
    """The modules that a file imports, also in functions and for type checkers. Imported names count as modules, which
    does no harm."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {module: _imports(path) for module, path in _modules()}


def _within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _ours(module: str) -> bool:
    return _within(module, set(PACKAGES))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_only_import_from_below(package: str) -> None:
    stricter = {other for other in MAY_IMPORT if other != package and _within(other, {package})}
    allowed = MAY_IMPORT[package] | {package}
    wrong = {
        (module, imported)
        for module, imports in IMPORTS.items()
        if _within(module, {package}) and not _within(module, stricter)
        for imported in imports
        if _ours(imported) and not _within(imported, allowed)
    }
    assert not wrong


def _importers(package: str) -> set[str]:
    return {module for module, imports in IMPORTS.items() if any(_within(each, {package}) for each in imports)}


@pytest.mark.parametrize("package", IMPORTED_BY)
def test_top_floors_are_only_imported_from_above(package: str) -> None:
    allowed = IMPORTED_BY[package] | {package}
    wrong = {module for module in _importers(package) if not _within(module, allowed)}
    assert not wrong


@pytest.mark.parametrize("face", FACES)
def test_only_the_application_imports_a_face(face: str) -> None:
    package = f"loraplex_router.api.http.{face}"
    wrong = {module for module in _importers(package) if not _within(module, {package, "loraplex_router.api.http.app"})}
    assert not wrong


@pytest.mark.parametrize("package", FLOORS)
def test_modules_only_import_from_the_floors_below(package: str) -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms}
    ours = {module: imports for module, imports in IMPORTS.items() if module.startswith(f"{package}.")}
    assert {module.split(".")[1] for module in ours} == floor_of.keys()
    wrong = {
        (module, imported)
        for module, imports in ours.items()
        for imported in imports
        if imported.startswith(f"{package}.")
        if (here := module.split(".")[1]) != (there := imported.split(".")[1])
        if floor_of[there] >= floor_of[here]
    }
    assert not wrong


@pytest.mark.parametrize("library", FOREIGN)
def test_heavy_libraries_are_only_imported_where_they_are_needed(library: str) -> None:
    wrong = {module for module in _importers(library) if not _within(module, FOREIGN[library])}
    assert not wrong


def test_every_name_in_the_rules_is_a_module() -> None:
    named = {*MAY_IMPORT, *IMPORTED_BY, *set().union(*MAY_IMPORT.values(), *IMPORTED_BY.values())}
    assert named <= IMPORTS.keys()
