"""Shards on remote stores: row bytes by ranged reads, or whole shards in a bounded folder of this machine."""
