"""The router: queues, schedules and streams; it owns the text and all state but the tensors.

From the ground up: `vocabulary/` (requests, sequences, plans); `text/`, `wire/` (gRPC to the shards), `access/`
(API keys); `engine/` (one replica's loop and scheduler); `adapters/`; `replicas/`; `telemetry/`; `service/` (what the
faces call); `api/` (the faces); `app.py`. A folder imports only from those below it.
"""
