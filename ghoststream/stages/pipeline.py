"""A pipeline: capture, selection, solving, export and evaluation, written down in one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.operators import make_operator
from ghoststream.options import Method, Solver
from ghoststream.recipe import Bos, StoreDtype, TextPart
from ghoststream.selection import make_criterion
from ghoststream.stages.repair.auto import AUTO, require_no_options
from ghoststream.stages.searching.search import SEARCH_CRITERIA
from ghoststream.stages.solve_request import asked_method
from ghoststream.statistics import Precision, get_feature, get_token_weight


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """Which model, and how it is computed; the fields are the options of the same names."""

    path: str | None = None
    revision: str | None = None
    dtype: StoreDtype | None = None
    attention: str | None = None
    micro_batch: int | None = Field(default=None, ge=1)


class CapturePart(_Part):
    """What goes into the store."""

    calibration: str
    sequences: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    layers: tuple[int, ...] | None = None
    store_dtype: StoreDtype | None = None
    pack: bool = True
    bos: Bos = "auto"


class SelectPart(_Part):
    """Which layers go: so many by a criterion of ``select`` or ``search``, or spans given by hand (``"13:19"``).

    ``max_spans`` is for the criterion ``measured``, ``held_out`` for whatever is measured, the operator ``auto`` too.
    """

    remove: int | None = Field(default=None, ge=1)
    criterion: str = "streamline"
    max_spans: int | None = Field(default=None, ge=1)
    held_out: int | None = Field(default=None, ge=1)
    spans: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.remove is None) == (self.spans is None):
            msg = "give either `remove` (how many layers) or `spans` (which, for example 13:19)"
            raise ValueError(msg)
        if self.max_spans is not None and (self.remove is None or self.criterion != "measured"):
            msg = "`max_spans` is a choice of the criterion measured; leave it out"
            raise ValueError(msg)
        if self.criterion not in SEARCH_CRITERIA:
            make_criterion(self.criterion)
        return self


class SolvePart(_Part):
    """What is fitted, from the store; or in passes over the model, with the operator ``auto``."""

    operator: str = "ghost"
    ridge: Annotated[float, Field(ge=0)] | Literal["auto", "gcv"] | None = None
    shrink: Literal["identity", "zero"] = "identity"
    features: str = "hidden"
    intercept: bool = False
    rank: int | None = Field(default=None, ge=1)
    solver: Solver = "gram"
    per_layer: bool = False
    sketch_size: int | None = Field(default=None, ge=1)
    power_iterations: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    precision: Precision = "float64"
    weights: str = "uniform"

    @property
    def options(self) -> Method:
        """The options of the operator."""
        return Method(**self.model_dump(exclude={"operator", "precision", "weights"}))

    @model_validator(mode="after")
    def _known(self) -> Self:
        get_feature(self.features)
        get_token_weight(self.weights)
        if self.operator == AUTO:
            require_no_options(self.weights, self.options)
        else:
            make_operator(asked_method(self.operator, self.options, self.weights))
        return self


class EvaluatePart(_Part):
    """What the base and the recovered model are measured on."""

    text: str
    length: int = Field(default=512, ge=2)
    sequences: int | None = Field(default=None, ge=1)
    part: TextPart = "all"
    pack: bool = True
    bos: Bos = "auto"


class Pipeline(_Part):
    """A whole run. Unknown fields are refused; ``solve`` has defaults, ``evaluate`` may be left out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: ModelPart = ModelPart()
    capture: CapturePart
    select: SelectPart
    solve: SolvePart = SolvePart()
    evaluate: EvaluatePart | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a pipeline file.

        Raises:
            InputNotFoundError: If there is no such file.
            RequestError: If it is not YAML, or a field is missing, unknown or out of range.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, IsADirectoryError) as error:
            msg = f"there is no pipeline file {path}; check the path"
            raise InputNotFoundError(msg) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            msg = f"{path} is not YAML: {' '.join(str(error).split())}"
            raise RequestError(msg) from error
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            )
            msg = f"{path} is not a pipeline: {problems}"
            raise RequestError(msg) from error

    @property
    def needs_store(self) -> bool:
        """Whether a stage reads hidden states that were captured."""
        selected = self.select.remove is not None and self.select.criterion not in SEARCH_CRITERIA
        return selected or self.solve.operator != AUTO
