"""Which layers go and how the gaps are repaired, both by running the model."""

from __future__ import annotations

# Their criteria are known by name.
from ghoststream.stages.choosing import prune_and_comp as prune_and_comp
from ghoststream.stages.choosing import shortened_llama as shortened_llama
