"""ghoststream's methods: the pass, the capture stage, the two that bound them, and lanes.

Nothing of ghoststream is imported before it is used: rivals run in environments that lack it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pass_result import PreparedRun, Result, numbers


def hidden_pass(model: Path, ids: Any, micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare ghoststream's streamed pass of the dense model."""
    return streamed(_skeleton(model), ids, micro_batch)


def streamed(skeleton: Any, ids: Any, micro_batch: int) -> PreparedRun:
    """Prepare a pass of the dense lane over a skeleton."""
    from ghoststream.spans import PruningPlan
    from ghoststream.streaming import Batch, Lane, StatesFactory, StreamedPass, make_batches

    class Last:
        states: Any = None

        def wants(self, position: int) -> bool:
            return bool(position == skeleton.n_layers)

        def observe(self, position: int, batch: Batch, states: Any) -> None:
            self.states = states

        def finished(self, position: int) -> None: ...

        def failed(self) -> None: ...

    batches = make_batches(ids, None, micro_batch)
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    last = Last()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(last,))

    def work() -> Result:
        StreamedPass(skeleton, batches, [lane], factory).run()
        return Result(lambda: numbers(last.states), _reading([skeleton]))

    return work


def capture(model: Path, ids: Any, micro_batch: int, work: Path) -> PreparedRun:
    """Prepare ghoststream's capture of all positions."""
    import ghoststream as gs

    gs.capture  # noqa: B018 - imports are in nobody's time: these, and those that opening the model makes
    _skeleton(model)
    spec = work / "ids.npy"
    np.save(spec, ids)
    text = gs.Text(spec=f"ids:{spec}", sequences=len(ids), length=ids.shape[1])

    def run() -> Result:
        store = gs.capture(
            model,
            calibration=text,
            store=work / "store",
            compute=gs.Compute(micro_batch=micro_batch),
        )
        last = store.layers[-1]
        return Result(lambda: numbers(store.read(last, len(ids) - 1, len(ids))))

    return run


def read_alone(model: Path, _ids: Any, _micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare to read every layer as a pass does, and to do nothing with it."""
    skeleton = _skeleton(model)

    def work() -> Result:
        for layer in range(skeleton.n_layers):
            skeleton.read_layer(layer)
        return Result(figures=_reading([skeleton]))

    return work


def compute_alone(model: Path, ids: Any, micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare a pass that reads nothing: two layers' weights stand for all (layers of one shape only)."""
    skeleton = _skeleton(model)
    kept = [skeleton.read_layer(layer) for layer in (0, 1)]
    skeleton.read_layer = lambda layer: kept[layer % 2]
    run = streamed(skeleton, ids, micro_batch)

    def work() -> Result:
        run()
        return Result()

    return work


def one_lane(model: Path, ids: Any, micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare the losses of the dense model."""
    skeleton = _skeleton(model)
    return _losses([(skeleton, _lanes(skeleton, len(ids))[:1])], ids, micro_batch)


def twelve_lanes(model: Path, ids: Any, micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare the losses of twelve lanes in one pass."""
    skeleton = _skeleton(model)
    return _losses([(skeleton, _lanes(skeleton, len(ids)))], ids, micro_batch)


def twelve_passes(model: Path, ids: Any, micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare the losses of the same twelve, a pass over a model opened anew for each."""
    lanes = _lanes(_skeleton(model), len(ids))
    return _losses([(_skeleton(model), [lane]) for lane in lanes], ids, micro_batch)


def _lanes(skeleton: Any, n_sequences: int) -> list[Any]:
    """Return the dense lane and eleven that leave out a fifth of the layers, from everywhere in the depth."""
    from ghoststream.evaluation import LossAccumulator
    from ghoststream.spans import PruningPlan, Span
    from ghoststream.stages.lanes import operator_lane
    from ghoststream.streaming import Lane
    from ghoststream.testing.operators import random_operators

    n_layers = skeleton.n_layers
    removed = max(1, n_layers // 5)
    lanes = [Lane("dense", PruningPlan(n_layers), logits=LossAccumulator(n_sequences))]
    for number in range(11):
        start = 1 + number * (n_layers - removed - 1) // 10
        plan = PruningPlan(n_layers, (Span(start, start + removed),))
        operators = random_operators(plan, skeleton.hidden_size, seed=number)
        losses = LossAccumulator(n_sequences)
        lanes.append(operator_lane(f"variant {number}", operators, skeleton, losses))
    return lanes


def _losses(passes: list[tuple[Any, list[Any]]], ids: Any, micro_batch: int) -> PreparedRun:
    from ghoststream.evaluation import default_logit_tokens
    from ghoststream.streaming import PassOptions, StatesFactory, StreamedPass, make_batches

    batches = make_batches(ids, None, micro_batch)

    def run_one(skeleton: Any, lanes: list[Any]) -> None:
        factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
        options = PassOptions(logit_tokens=default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes))
        StreamedPass(skeleton, batches, lanes, factory, options).run()

    def work() -> Result:
        for skeleton, lanes in passes:
            run_one(skeleton, lanes)
        observers = [lane.logits for _, lanes in passes for lane in lanes]
        shown = observers if len(observers) == 1 else [observers[number] for number in (0, 1, 6, 11)]
        return Result(lambda: [one.summary().loss for one in shown], _reading([one for one, _ in passes]))

    return work


def _reading(skeletons: list[Any]) -> dict[str, int]:
    """Return the bytes read of the checkpoint, those that it has, and those of its embedding."""
    first = skeletons[0]
    embedding = first.model.get_input_embeddings().weight
    return {
        "reader_bytes": sum(skeleton.reader.bytes_read for skeleton in skeletons),
        "checkpoint_bytes": first.index.n_bytes,
        "embedding_bytes": embedding.numel() * embedding.element_size(),
        "tied": int(first.config.tie_word_embeddings),
    }


def _skeleton(model: Path) -> Any:
    from ghoststream.streaming import Skeleton

    return Skeleton(model)
