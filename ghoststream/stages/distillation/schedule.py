"""How a text is parted for training, and how long is trained: known before the text is read. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ghoststream.errors import RequestError
from ghoststream.options import Training

SAVE_SECONDS = 60.0
"""Between two looks at held-out sequences a training is saved so often; that decides no bit of it."""

LENGTHS = (0.015, 0.036, 0.087, 0.21, 0.5)
"""How far a round of boosting goes along its direction, in units of the length that would end at no
divergence on the slope there: each is measured on held-out windows."""

_OF_STEPS = ("train", "batch", "learning_rate", "seed")


@dataclass(frozen=True)
class Schedule:
    """Which sequences are trained on, and how many steps are taken.

    Attributes:
        n_train: Sequences that are trained on, the first ones.
        held_out: Sequences that are held out, the last ones.
        batch: Sequences of a step.
        steps: Steps of the optimiser, at most.
        check: Steps between two looks at the held-out sequences.
        boost: Rounds of boosting before the steps, at most.
    """

    n_train: int
    held_out: int
    batch: int
    steps: int
    check: int
    boost: int

    @classmethod
    def of(cls, training: Training, n_sequences: int) -> Schedule:
        """Part the sequences of a text.

        Args:
            training: What was asked for.
            n_sequences: Sequences of the text.

        Raises:
            RequestError: If the text has too few of them, or an option would not be used.
        """
        batch, n_steps = training.batch, training.steps
        held_out = n_sequences // 4 if training.held_out is None else training.held_out
        n_train = n_sequences - held_out
        if n_steps == 0:
            training.refuse(_OF_STEPS, "no step is taken")
            batch = 1
        if held_out < 1 or n_train < batch:
            msg = (
                f"{n_sequences} windows cannot be parted into {held_out} held-out ones and at least one "
                f"batch of {batch} to train on; give more windows, or a smaller batch"
            )
            raise RequestError(msg)
        if n_steps is not None:
            training.refuse(("epochs",), "--steps says how long is trained")
        steps = training.epochs * -(-n_train // batch) if n_steps is None else n_steps
        # A look at a window costs a third of a step on it: with this a ninth of the steps themselves.
        return cls(n_train, held_out, batch, steps, max(1, 3 * held_out // batch), training.boost)

    @property
    def n_checks(self) -> int:
        """Looks at the held-out sequences, at most."""
        return 1 + self.boost + -(-self.steps // self.check)
