"""The version of the protocol between a router and its shards: releases are mixed during an upgrade."""

from loraplex_protos.generation_pb2 import Sampling

# Raise the number with every change of shard.proto that an older side would silently ignore. A new sampling parameter
# raises the version by itself.
PROTOCOL_VERSION = 7 + len(Sampling.DESCRIPTOR.fields)
