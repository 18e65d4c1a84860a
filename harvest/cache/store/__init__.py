"""The two kinds of place that a cache may lie in."""
