"""SAEs (and the LM) in; numbers out."""
