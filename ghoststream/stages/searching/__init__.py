"""Choosing the layers to remove by running the model."""
