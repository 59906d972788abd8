"""A measurement whose sequences several workers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghoststream.activations import ActivationStore
from ghoststream.errors import MismatchError
from ghoststream.evaluation import LossSums
from ghoststream.files import differences
from ghoststream.options import Compute, Text
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.measuring.measurement import Measurement
from ghoststream.stages.measuring.model_groups import group_models
from ghoststream.stages.workers import Workers
from ghoststream.text import TokenSet


def measure_shares(
    workers: Workers,
    measurement: Measurement,
    models: Sequence[str | Path],
    number: int,
    text: Text | str,
    compute: Compute,
    progress: Progress,
) -> None:
    """Have workers run the pass of a measurement, each over some sequences, and add up what they find.

    Losses are summed by sequence, so that no bit depends on the number of workers.

    Args:
        workers: The workers. They see the models, and the store if one is given.
        measurement: What is measured; it runs no pass here.
        models: The models of the whole request, in their order.
        number: Number of the measurement's group of them.
        text: Which tokens, or the URI of the store whose tokens and states are taken.
        compute: How models are opened and run.
        progress: Who is told how far it is.

    Raises:
        MismatchError: If a worker finds another model.
        GhoststreamError: What :meth:`~ghoststream.stages.workers.Workers.run` raises.
    """
    rows = workers.rows(measurement.tokens.n_sequences, measurement.micro_batch)
    same = compute.model_copy(update={"micro_batch": measurement.micro_batch})
    request = (models, number, text, measurement.tokens, measurement.requests())
    shares = [(*request, own) for own in rows]
    sizes = [stop - start for start, stop in rows]
    for sums in workers.run(measure_share, same, shares, sizes, progress):
        measurement.add(sums)


def measure_share(
    compute: Compute,
    models: Sequence[str | Path],
    number: int,
    text: Text | str,
    tokens: TokenSet,
    asked: list[tuple[int, dict[str, Any]]],
    rows: tuple[int, int],
) -> list[LossSums]:
    """Measure some sequences of a group of models, on a worker; the sums are the same as in one process.

    Raises:
        MismatchError: If the models are not those of the request.
        GhoststreamError: What opening models or the store, and the pass raise.
    """
    silent = SilentProgress()
    wanted = text if isinstance(text, Text) else ActivationStore.open(text)
    measurement = Measurement(group_models(models, compute)[number], wanted, silent, tokens)
    changed = differences(
        *({str(place): one for place, one in what} for what in (measurement.requests(), asked))
    )
    if changed:
        msg = (
            f"a worker finds another request at {', '.join(map(str, models))} than this process "
            f"({', '.join(changed)}); give paths that name the same models for all workers"
        )
        raise MismatchError(msg)
    measurement.run(silent, rows)
    return measurement.sums()
