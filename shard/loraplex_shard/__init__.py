"""A shard: one rank of a tensor-parallel group. It holds the model, the KV cache and the adapters, and runs plans.

`server.py` builds it from its parts. `service.py` answers gRPC, `steps.py` and `runner.py` run plans, `models/`,
`layers/` and `ops/` compute them, `lora/` keeps adapters, `checkpoint/` reads models. ARCHITECTURE.md has the map.
"""
