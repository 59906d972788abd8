"""Every option that a user can give, declared once.

The command line, the Python API and pipeline files use these very objects: the text of a field is its
``--help`` and its documentation, its constraint is checked everywhere, and a recipe embeds it. What was given
can be told from what is a default, so that a stage refuses by name what it would not use
(:meth:`Options.refuse`).

A new option is one field of its group and the line that reads it.
"""

from __future__ import annotations

from ghoststream.options.compute import Compute, Dtype, Reduction, Storage, StoredDtype, dtype_name
from ghoststream.options.method import AUTO, UNIFORM, Inputs, Method, Precision, Solver
from ghoststream.options.recovery import Form, GgufType, Recovery, Resume
from ghoststream.options.search import Exploration, Search
from ghoststream.options.text import Bos, Source, Text, TextLike, TextPart
from ghoststream.options.training import Training

__all__ = [
    "AUTO",
    "UNIFORM",
    "Bos",
    "Compute",
    "Dtype",
    "Exploration",
    "Form",
    "GgufType",
    "Inputs",
    "Method",
    "Precision",
    "Recovery",
    "Reduction",
    "Resume",
    "Search",
    "Solver",
    "Source",
    "Storage",
    "StoredDtype",
    "Text",
    "TextLike",
    "TextPart",
    "Training",
    "dtype_name",
]
