"""What a chat model makes of each latent."""
