"""Text generated with latents changed."""
