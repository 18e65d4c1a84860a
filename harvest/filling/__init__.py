"""Rows of token ids through the LM into whole shards."""
