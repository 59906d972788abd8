"""The optimiser of a distillation: steps relative to what is trained, the best of them kept, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ghoststream.files import read_kept
from ghoststream.files.tensor_files import TensorFile, write_tensors

BETAS = (0.9, 0.99)
"""Of Adam. A second moment over a hundred steps suits runs of some hundred."""

SMALLEST_SCALE = 2.0**-4
"""Training ends when the steps were halved more often than this."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Check:
    """A look at the held-out sequences.

    Attributes:
        step: Steps taken before it.
        tokens: Tokens that these have seen.
        divergence: On the held-out sequences.
        scale: Share of the step size that these steps had at the end.
        rounds: Rounds of boosting that count in it.
    """

    step: int
    tokens: int
    divergence: float
    scale: float
    rounds: int = 0


@dataclass
class Course:
    """Where a training is: what is kept of it beside arrays.

    Attributes:
        step: Steps taken.
        tokens: Tokens seen.
        scale: Share of the step size that is left after halving.
        before: Held-out divergence and next-token loss before the first step.
        losses: The divergence of each step.
        checks: The looks at held-out sequences, in order; the first one is before the first step.
        boosts: Figures of each round of boosting.
    """

    step: int = 0
    tokens: int = 0
    scale: float = 1.0
    before: tuple[float, float] | None = None
    losses: list[float] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    boosts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> Check:
        """The check with the smallest divergence, the first of several."""
        return min(self.checks, key=lambda check: check.divergence)

    @property
    def ended(self) -> bool:
        """Whether steps have become too small to go on."""
        return self.scale < SMALLEST_SCALE


class Descent:
    """Adam whose steps are relative to the size of each tensor, with backtracking.

    The step of an entry is at most a share of the root mean square that its tensor had at the beginning: one
    number serves matrices and norms of all scales. After a check that is no better than the best one so far,
    the parameters are those of the best check again, the first moments zero, and steps half as long from then
    on: a rate that is too large costs the steps between two checks, and no more. (A second moment is a scale
    of the gradient, which does not change by going back.)

    Args:
        parameters: What is trained, by name; float32.
        path: The file that :meth:`save` writes.

    Memory: 16 bytes for each element: itself, the best one, two moments; and 4 for its gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
        self._parameters, self._path = parameters, path
        self._sizes = {name: _size(one) for name, one in parameters.items()}
        self._best = {name: one.detach().clone() for name, one in parameters.items()}
        groups = [{"params": [one], "name": name} for name, one in parameters.items()]
        # One implementation on every device.
        self._optimizer = torch.optim.Adam(groups, betas=BETAS, foreach=False)
        self.course = Course()

    @property
    def n_bytes(self) -> int:
        """Bytes that parameters and what belongs to them take now: moments and gradients come with a step."""
        found = 0
        for name, one in self._parameters.items():
            moments = (value for key, value in self._optimizer.state.get(one, {}).items() if key in _MOMENTS)
            own = [one, self._best[name], *moments, *([] if one.grad is None else [one.grad])]
            found += sum(tensor.nbytes for tensor in own)
        return found

    @property
    def most_bytes(self) -> int:
        """Bytes that they take at a step."""
        return 5 * sum(one.nbytes for one in self._parameters.values())

    def zero(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def step(self, rate: float, loss: float, tokens: int) -> None:
        """Take a step along the gradients.

        Args:
            rate: Largest step of an entry, as a share of its tensor's size.
            loss: Where the gradients were taken.
            tokens: How many tokens they were taken on.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self.course.scale * self._sizes[group["name"]]
        self._optimizer.step()
        self.course.step += 1
        self.course.tokens += tokens
        self.course.losses.append(loss)

    def check(self, divergence: float) -> None:
        """Note a look at the held-out sequences, and go back where it is no better than the best."""
        if self._look(divergence):
            return
        self.course.scale /= 2
        for one in self._parameters.values():
            if one in self._optimizer.state:
                self._optimizer.state[one]["exp_avg"].zero_()

    def boosted(self, divergence: float, figures: dict[str, Any], tokens: int) -> None:
        """Note a round of boosting that has moved the parameters, and go back where nothing was gained.

        Args:
            divergence: On the held-out sequences.
            figures: Of the round.
            tokens: How many tokens it was fitted on.
        """
        self.course.boosts.append(figures)
        self.course.tokens += tokens
        self._look(divergence)

    def _look(self, divergence: float) -> bool:
        """Note a look at the held-out sequences, and go back where it is no better; say whether it is."""
        course = self.course
        is_best = not course.checks or divergence < course.best.divergence
        rounds = sum(one["gain"] > 0 for one in course.boosts)
        course.checks.append(Check(course.step, course.tokens, divergence, course.scale, rounds))
        if is_best:
            self._best = {name: one.detach().clone() for name, one in self._parameters.items()}
        else:
            self.go_back()
        return is_best

    def go_back(self) -> None:
        """Put the parameters of the best check in place."""
        for name, one in self._parameters.items():
            one.data.copy_(self._best[name])

    def save(self) -> None:
        """Write where the training is.

        Raises:
            DiskFullError: If no space is left.
        """
        arrays: dict[str, torch.Tensor] = {}
        for name, one in self._parameters.items():
            moments = self._optimizer.state.get(one, {})
            arrays |= {f"parameter.{name}": one, f"best.{name}": self._best[name]}
            arrays |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        host = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        write_tensors(self._path, host, asdict(self.course))

    def load(self) -> None:
        """Go on from where a run before this got to; from the beginning if it left nothing whole."""
        kept = read_kept(_read, self._path)
        if kept is None:
            return
        self.course, arrays = kept
        for name, one in self._parameters.items():
            values = {
                kind: torch.from_numpy(arrays[f"{kind}.{name}"]).to(one.device)
                for kind in ("parameter", "best", *_MOMENTS)
                if f"{kind}.{name}" in arrays
            }
            one.data.copy_(values.pop("parameter"))
            self._best[name] = values.pop("best")
            if values:
                self._optimizer.state[one] = {"step": torch.tensor(float(self.course.step)), **values}


def _size(parameter: torch.Tensor) -> float:
    """Return the root mean square of a tensor; one for a tensor of zeros."""
    size = float(parameter.detach().double().square().mean().sqrt())
    return size or 1.0


def _read(path: Path) -> tuple[Course, dict[str, npt.NDArray[np.float32]]]:
    with TensorFile(path) as file:
        found, arrays = dict(file.metadata), {name: file.read(name) for name in file.digests}
    checks = [Check(**one) for one in found.pop("checks")]
    before: Any = tuple(found.pop("before"))
    return Course(before=before, checks=checks, **found), arrays
