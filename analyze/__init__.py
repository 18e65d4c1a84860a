"""SAE (+ LM) → metrics."""
