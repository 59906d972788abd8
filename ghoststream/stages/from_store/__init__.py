"""Which layers go and how the gaps are repaired, both from the hidden states in a store."""
