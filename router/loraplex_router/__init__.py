"""The router: queues, schedules and streams; it owns the text and all state but the tensors.

The life of a request, file by file: api/ (the faces) -> service (checks, tokenizes, resolves the adapter) -> engine
(the loop) -> scheduler (what runs in the next step) -> shards (the seam to the ranks) -> output (text, stop strings,
events) -> api/.
"""
