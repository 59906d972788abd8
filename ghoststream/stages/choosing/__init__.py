"""Which layers go and how the gaps are repaired, both by running the model."""
