"""All sections, in the order in which they run: what is right first, then how fast it is, then the rest."""

from functools import partial

from bench.gpu import decode, decoders, environment, suites
from bench.gpu.check import Section

SECTIONS = (
    Section("environment", "check", 15, environment.checks),
    Section("decoders", "check", 60, decoders.checks),
    Section("tests", "check", 120, suites.checks),
    Section("decode, bfloat16", "speed", 90, decode.decodes),
    Section("prompts", "speed", 25, decode.prompts),
    *(Section(f"decode, {form}", "speed", 20, partial(decode.other, form)) for form in decode.OTHER),
)
