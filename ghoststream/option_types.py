"""What option groups are made of: their base class, the declaration of a field, and types of values.

The groups themselves are in :mod:`ghoststream.options`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from ghoststream.errors import RequestError
from ghoststream.spans import MOST_LAYERS

SPEC_FORMS = (
    "file:PATH (.txt, .jsonl or .parquet with `text` or `messages`; also .gz, .bz2, .xz, .zst), "
    "ids:FILE.npy, hf:NAME[:CONFIG]:SPLIT[:FIELD], wikitext2, ptb or c4 (each [:SPLIT]), "
    "python-docs[:fit|:heldout]"
)
"""How a text is named, for the help."""


def parse_layers(value: Any) -> Any:
    """Turn ``"0,10:20,30"`` into numbers, ascending and each once; ``A:B`` is half-open like every span.

    Raises:
        ValueError: If it names no layer.
    """
    if not isinstance(value, str):
        return value
    ranges = [_range(part) for part in value.split(",")]
    far = next((part for part in ranges if part is not None and part.stop > MOST_LAYERS + 1), None)
    if far is not None:
        msg = f"a range reaches past layer {MOST_LAYERS:,}, and no model has as many; check its numbers"
        raise ValueError(msg)
    numbers = _union(part for part in ranges if part is not None)
    if None in ranges or not numbers or numbers[0] < 0:
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        msg = f"{shown!r} names no layer; write for example 0,10:20,30"
        raise ValueError(msg)
    return tuple(numbers)


def _union(ranges: Iterable[range]) -> list[int]:
    """Return the numbers of all ranges, ascending and each once, however many of them overlap."""
    numbers: list[int] = []
    for part in sorted(ranges, key=lambda part: part.start):
        numbers += range(max(part.start, numbers[-1] + 1) if numbers else part.start, part.stop)
    return numbers


def _range(part: str) -> range | None:
    start, colon, stop = part.partition(":")
    try:
        found = range(int(start), int(stop) if colon else int(start) + 1)
    except ValueError:
        return None
    return found or None


def _parse_ridge(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0 if value in (None, "auto", "gcv") else -1.0
    if not 0.0 <= number < float("inf"):
        msg = f"{value!r} is no ridge; give a number of at least 0, for example 1e-6, auto or gcv"
        raise ValueError(msg)
    return value if value in (None, "auto", "gcv") else number


_LEAST_BYTES = 2**20
"""Fewer are no amount of memory that is meant where no unit stands."""
_BYTES: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


def _parse_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*([kmgt]?i?b?)?\s*", value, re.IGNORECASE) is None:
        msg = f"{value!r} is not an amount of bytes; write for example 8GiB or 500MB"
        raise ValueError(msg)
    if value.strip().isdigit() and 0 < int(value) < _LEAST_BYTES:
        msg = f"{value.strip()} is so many bytes; write the unit, as in {value.strip()}GiB"
        raise ValueError(msg)
    # A letter alone stands for a binary unit, as it does for other tools.
    text = f"{value.rstrip()}iB" if value.rstrip()[-1].lower() in "kmgt" else value
    return int(_BYTES.validate_python(text))


MOST = 2**63 - 1
"""Largest number that any option takes: what arrays are indexed and files are measured with."""

MOST_COUNTED = 2**31 - 1
"""Most tokens, windows, candidates and the like: no text gives, and no machine holds, as many."""

Count = Annotated[int, Field(ge=1, le=MOST_COUNTED)]
Number = Annotated[int, Field(ge=0, le=MOST)]
Few = Annotated[int, Field(ge=0, le=MOST_COUNTED)]
Length = Annotated[int, Field(ge=2, le=MOST_COUNTED)]
Layer = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
Nats = Annotated[float, Field(gt=0, le=100)]
Ridge = Annotated[float | Literal["auto", "gcv"] | None, BeforeValidator(_parse_ridge)]
Bytes = Annotated[Number, BeforeValidator(_parse_bytes)]
Layers = Annotated[tuple[Layer, ...], BeforeValidator(parse_layers)]


def option(
    default: Any, text: str, *, usual: bool = False, metavar: str | None = None, bare: str | None = None
) -> Any:
    """Declare a field.

    Args:
        default: Its default.
        text: What help and documentation say. A short help shows the first line, a full one all of them.
        usual: Whether a short help shows it.
        metavar: How the help names a value.
        bare: What the option means on a command line that gives it no value; there it needs one if ``None``.
    """
    extra: dict[str, Any] = {"usual": usual}
    extra |= {name: one for name, one in (("metavar", metavar), ("bare", bare)) if one is not None}
    return Field(default, description=text, json_schema_extra=extra)


class Options(BaseModel):
    """Base of all groups of options: frozen, no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    title: ClassVar[str] = "Options"
    """Heading of the group in a help."""

    @classmethod
    def make(cls, values: dict[str, Any], *, where: str = "") -> Self:
        """Make the options of plain data.

        Args:
            values: What was given, by field.
            where: Where it was read, for the message.

        Raises:
            RequestError: If a field is unknown, missing or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            msg = f"{where}{': ' if where else ''}{'; '.join(problems(error))}"
            raise RequestError(msg) from error

    def given(self, names: Iterable[str] | None = None) -> tuple[str, ...]:
        """Return which of some fields (of all, without names) were given, in the order of declaration.

        None in the place of a default that is None is not given.
        """
        fields = type(self).model_fields
        wanted = self.model_fields_set & set(fields if names is None else names)
        return tuple(
            name
            for name, field in fields.items()
            if name in wanted and not (field.default is None and getattr(self, name) is None)
        )

    def refuse(self, names: Iterable[str] | None, because: str) -> None:
        """Check that none of some fields (of all, with None) was given, since nothing would read it.

        Raises:
            RequestError: If one was: names it as the command line does.
        """
        found = self.given(names)
        if found:
            msg = f"{', '.join(map(flag, found))} would not be used: {because}; leave it out"
            raise RequestError(msg)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON data, for recipes."""
        return self.model_dump(mode="json")


def flag(name: str) -> str:
    """Write a field's name as the command line does."""
    return f"--{name.replace('_', '-')}"


def problems(error: ValidationError) -> list[str]:
    """Say what pydantic found, one line a field."""
    return [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), _problem(item)))) for item in error.errors()
    ]


def _problem(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "there is no such option"
    if item["type"] == "missing":
        return "is missing"
    return str(item["msg"]).removeprefix("Value error, ")


def one_or_several(value: Any) -> Any:
    """Write specifications of texts in one way: one is a text, several are a tuple.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(value, list | tuple):
        return value
    if not value:
        msg = "no text is named; give at least one"
        raise ValueError(msg)
    return value[0] if len(value) == 1 else tuple(value)


def _or_spec(value: Any) -> Any:
    return {"spec": value} if isinstance(value, str | list | tuple) else value


OR_SPEC = BeforeValidator(_or_spec)
"""The specification of a text alone stands for it, and so do several."""
