"""Training the operators alone towards the dense model."""
