"""Documents, tokens and the packed rows of token ids that every later step starts from."""
