"""Every stage in one go."""
