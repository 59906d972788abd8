"""The forms in which a recovered model is written: one file each.

Importing this package imports neither torch nor transformers; writing does.
"""

from __future__ import annotations

from ghoststream.recovery.forms.adapter import Adapter
from ghoststream.recovery.forms.custom import Custom
from ghoststream.recovery.forms.folded import Folded
from ghoststream.recovery.forms.form import Form, WriteRequest
from ghoststream.recovery.forms.gguf import Gguf
from ghoststream.recovery.forms.mlx import Mlx
from ghoststream.registry import Registry

__all__ = ["Adapter", "Custom", "Folded", "Form", "Gguf", "Mlx", "WriteRequest", "find_form", "form_names"]

_FORMS: Registry[Form] = Registry("form", name_of=lambda form: form.name)
for _form in (Adapter(), Custom(), Folded(), Gguf(), Mlx()):
    _FORMS.add(_form)


def find_form(name: str) -> Form:
    """Return the form of this name.

    Raises:
        RequestError: If there is none.
    """
    return _FORMS.get(name)


def form_names() -> tuple[str, ...]:
    """Return the names of all forms, sorted."""
    return _FORMS.names()
