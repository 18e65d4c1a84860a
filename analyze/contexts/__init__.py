"""What every latent is active on, as text."""
