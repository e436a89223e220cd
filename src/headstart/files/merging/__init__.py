"""Adapters into a checkpoint on disk, shard by shard; several adapters into one."""
