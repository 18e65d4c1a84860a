"""The language model: loaded, cut after a layer, and read block by block."""
