"""An SAE on disk, and its conversions from and to other formats."""
