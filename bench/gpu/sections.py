"""All sections, in the order in which they run: what is right first, then how fast it is, then the rest."""

from functools import partial
from pathlib import Path

from bench.gpu import (
    adapters,
    attention,
    budget,
    compiling,
    decode,
    decoders,
    environment,
    graphs,
    kernels,
    large,
    memory,
    profile,
    races,
    ranks,
    sampling,
    served,
    suites,
)
from bench.gpu.check import Section


def sections(folder: Path) -> tuple[Section, ...]:
    """`folder`: where files go."""
    return (
        Section("environment", "check", 20, environment.checks),
        Section("compiling", "check", 60, compiling.checks),
        Section("decoders", "check", 45, decoders.checks),
        Section("races", "check", 25, races.checks),
        Section("graphs", "check", 25, graphs.checks),
        Section("attention, beside torch's", "check", 15, attention.same),
        Section("large memory", "check", 10, large.checks),
        Section("ranks", "check", 20, ranks.checks),
        Section("tests", "check", 100, suites.checks),
        Section("decode, bfloat16", "speed", 80, decode.decodes),
        Section("prompts", "speed", 25, decode.prompts),
        *(Section(f"decode, {form}", "speed", 15, partial(decode.other, form)) for form in decode.OTHER),
        Section("sampling", "speed", 15, sampling.checks),
        Section("adapters", "speed", 20, adapters.checks),
        Section("memory", "speed", 15, memory.checks),
        Section("budget", "speed", 30, budget.checks),
        Section("kernels", "speed", 30, kernels.checks),
        Section("attention", "speed", 25, attention.speed),
        Section("served", "speed", 80, served.checks),
        Section("host", "profile", 20, profile.host),
        Section("steps", "profile", 25, profile.steps),
        Section("kernels of steps", "profile", 25, profile.kernels),
        Section("trace", "profile", 15, partial(profile.trace, folder)),
    )
