"""The cache format, on disk and in an object store. Knows nothing of language models."""
