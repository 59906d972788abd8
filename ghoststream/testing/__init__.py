"""Tiny models, and what users need to test their own parts against this library."""
