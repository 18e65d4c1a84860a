"""Caches in an object store: its folders and objects, arrays read by ranges, shards on their way there."""
