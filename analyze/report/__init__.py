"""The page: one HTML file of SAEs and their latents."""
