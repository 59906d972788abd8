"""Fitting and measuring operators while a pass runs, and choosing how."""
