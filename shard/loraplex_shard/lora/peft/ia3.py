"""(IA)3: a factor for each output of a module, or for each input of a feedforward module.

The inputs of a gated MLP's last module are products with the outputs of another module, so a factor for such an input
is the same as a factor for that output.
"""

from collections.abc import Mapping, Sequence

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.kinds import Ia3Config
from loraplex_shard.lora.peft.outputs import name_of_factors
from loraplex_shard.lora.peft.patterns import matching_names
from loraplex_shard.lora.peft.taken import Taken
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b
from loraplex_shard.shapes.layout import LinearLayout


def as_output_factors(
    config: Ia3Config,
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, int]],
    gated: Mapping[str, str],
) -> tuple[dict[str, torch.Tensor], dict[str, Target]]:
    """As as_lora: with an A and a B of no rank, and with factors, by outputs.name_of_factors.

    `gated`: for the last module of each gated MLP the one whose outputs its inputs are products with. Raises
    AdapterInvalidError, also for feedforward modules that are not among these.
    """
    taken, found = Taken(tensors), dict[str, torch.Tensor]()
    feedforward = _feedforward(config, list(targets))
    for module in targets:
        inputs, outputs = shapes[module]
        own = module
        if module in feedforward:
            if module not in gated:
                raise AdapterInvalidError(
                    f"adapter_config.json: feedforward_modules: {module}: not supported: (IA)3 is served for inputs of"
                    " gated MLPs of loraplex's own decoder alone"
                )
            own = gated[module]
            factors = taken.take(f"{module}.ia3_l", 1, inputs)
        else:
            factors = taken.take(f"{module}.ia3_l", outputs, 1)
        found[own] = factors.flatten() * found.get(own, 1)
    for module, factors in found.items():
        taken.left[name_of_factors(module)] = factors
        taken.left[name_of_a(module)] = torch.zeros(0, shapes[module][0])
        taken.left[name_of_b(module)] = torch.zeros(shapes[module][1], 0)
    return taken.left, {module: Target(0, 1.0) for module in found}


def gated_mlps(layouts: Sequence[LinearLayout]) -> dict[str, str]:
    """The last module of each gated MLP, with the module whose outputs are factors of its inputs."""
    first = {layout.name: layout.parts for layout in layouts if layout.name.endswith(".gate_up")}
    found = {}
    for layout in layouts:
        parts = first.get(f"{layout.name.removesuffix('.down')}.gate_up", ())
        if layout.name.endswith(".down") and len(parts) == 2:
            found[layout.parts[0].module] = parts[1].module
    return found


def _feedforward(config: Ia3Config, targets: Sequence[str]) -> frozenset[str]:
    modules = config.feedforward_modules
    if isinstance(modules, str):
        return matching_names("feedforward_modules", [modules], targets)[0]
    return frozenset(name for name in targets if name.endswith(tuple(modules)))
