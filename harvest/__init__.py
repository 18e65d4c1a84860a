"""text → tokens → hidden states → shards."""
