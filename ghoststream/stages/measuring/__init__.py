"""Losses and task results of models, streamed."""
