"""A shard: one rank of a tensor-parallel group. It holds the model, the KV cache and the adapters, and runs plans.

`serving/` is the process and its gRPC service, `stepping/` runs plans, `sampling/` chooses tokens, `models/`, `layers/`
and `ops/` compute, `kernels/` is the C++ below them, `shapes/` is what all of them speak of, `lora/` keeps adapters,
`checkpoint/` reads models, `device/` is memory and the ranks of a group, `observation/` metrics and traces.
ARCHITECTURE.md has the map.
"""
