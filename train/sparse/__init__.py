"""Which latents are active, and their gradients."""
