"""Latents on one's own text, and the latents of two SAEs side by side."""
