"""A lane that scores some tokens only, of batches of several lengths, against the resident model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ghoststream.spans import PruningPlan
from ghoststream.streaming import Batch, Lane, PassOptions, Skeleton, StatesFactory, StreamedPass
from ghoststream.testing.models import save_tiny, tiny_model

pytestmark = pytest.mark.integration
N_LAYERS = 6
LENGTHS = (24, 16, 16, 8)


class Logits:
    """Keeps the logits of each batch, and how many tokens were shown at once."""

    def __init__(self) -> None:
        self.shown: dict[int, list[torch.Tensor]] = {}

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        parts = self.shown.setdefault(batch.index, [])
        assert first == sum(len(part) for part in parts)
        parts.append(logits.clone())


def _batches() -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    start = 0
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, 128, (index + 1, length), generator=generator)
        batches.append(Batch(index, start, ids, None))
        start += len(ids)
    return tuple(batches)


def _scored(batch: Batch) -> torch.Tensor:
    """Every third token, but none of the last batch."""
    return torch.arange(0, batch.ids.numel(), 3)[: 0 if batch.index == 3 else None]


@pytest.mark.parametrize("logit_tokens", [4, None])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "falcon"])
def test_logits_of_the_scored_tokens_are_the_resident_models(
    family: str, logit_tokens: int | None, tmp_path: Path
) -> None:
    skeleton, batches = Skeleton(save_tiny(family, tmp_path / "model")), _batches()
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    every, some, plan = Logits(), Logits(), PruningPlan(N_LAYERS)
    lanes = [Lane("every", plan, logits=every), Lane("some", plan, logits=some, scored=_scored)]
    StreamedPass(skeleton, batches, lanes, factory, PassOptions(logit_tokens=logit_tokens)).run()

    model = tiny_model(family)
    for batch in batches:
        with torch.inference_mode():
            resident = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
        torch.testing.assert_close(torch.cat(every.shown[batch.index]), resident, rtol=1e-5, atol=1e-5)
        wanted = resident[_scored(batch)]
        found = torch.cat([*some.shown.get(batch.index, []), resident[:0]])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        if logit_tokens is not None:
            assert all(len(part) <= logit_tokens for part in some.shown.get(batch.index, []))
