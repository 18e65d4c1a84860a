"""shards → shuffled batches → SAE → checkpoint."""
