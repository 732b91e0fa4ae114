"""The version of what a router and its shards say to each other: releases meet during an upgrade."""

# To be raised with every change of shard.proto that is lost on a side that does not know it.
PROTOCOL_VERSION = 3
