"""Open what an analysis reads, SAEs, cache and LM, and check that they belong together."""
