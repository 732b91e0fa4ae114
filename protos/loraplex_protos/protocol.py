"""The version of the protocol between a router and its shards: releases are mixed during an upgrade."""

# Raise it with every change of shard.proto that an older side would silently ignore.
PROTOCOL_VERSION = 3
