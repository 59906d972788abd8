"""Which features a recovered checkpoint can hold operators on; torch is not needed to ask."""

from __future__ import annotations

from ghoststream.statistics.features import HIDDEN_AND_MLP, MLP, MLP_OUTPUT

ABSORBED = (MLP.name, MLP_OUTPUT.name, HIDDEN_AND_MLP.name)
"""Features whose operators are absorbed into a weight, the last in part."""

ABSORBED_WHOLE = (MLP.name, MLP_OUTPUT.name)
"""Those of which nothing stays at the boundary: a constant goes into the weight's bias."""

FEATURES = ("hidden", "normed", "hidden+normed", *ABSORBED)
"""Features that a recovered checkpoint can hold operators on."""
