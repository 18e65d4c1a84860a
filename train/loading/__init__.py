"""Shuffled batches of hidden states, from shards to the device."""
