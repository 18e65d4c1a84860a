"""Scores of SAEs, from the cache alone or with the LM."""
