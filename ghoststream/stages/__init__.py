"""Stages join the rooms into steps that can be run again; each is one module with one function to call."""
