"""Norms that a search notes in its plan, against the states of a resident model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ghoststream.stages.choosing.stream_norms as module
from ghoststream.progress import SilentProgress
from ghoststream.stages.choosing.ranking import rank_spans, similarity_maps
from ghoststream.stages.choosing.stream_norms import StreamNorms
from tests.helpers.searching import MICRO_BATCH, L, T, open_model, save_windows

pytestmark = pytest.mark.integration


def test_norms_and_similarities_are_those_of_a_resident_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = 1.2
    monkeypatch.setattr(module, "SINK_FACTOR", factor)
    resident = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    session, tokens = open_model(tiny_llama, save_windows(tmp_path))
    tokens.mask[1, T // 2 :] = False
    with torch.no_grad():
        states = resident(torch.from_numpy(tokens.ids).long(), output_hidden_states=True).hidden_states
    norms = StreamNorms(torch.from_numpy(tokens.mask))
    ranked = rank_spans(
        session, tokens, (1, 3), micro_batch=MICRO_BATCH, progress=SilentProgress(), beside=(norms,)
    )
    found = norms.to_json()
    assert found["position"] == list(range(L))
    n_massive = 0
    for position in range(L):
        windows = [
            np.linalg.norm(states[position][row][mask].numpy(), axis=-1)
            for row, mask in enumerate(tokens.mask)
        ]
        medians = [np.median(window) for window in windows]
        pairs = list(zip(windows, medians, strict=True))
        massive = sum(int((window > factor * median).sum()) for window, median in pairs)
        n_massive += massive
        assert found["mean"][position] == pytest.approx(np.concatenate(windows).mean(), rel=1e-5)
        assert found["median"][position] == pytest.approx(np.mean(medians), rel=1e-5)
        assert found["largest"][position] == pytest.approx(np.concatenate(windows).max(), rel=1e-5)
        assert found["largest_ratio"][position] == pytest.approx(
            max(window.max() / median for window, median in pairs), rel=1e-5
        )
        assert found["massive"][position] == massive
        assert found["tokens"][position] == tokens.mask.sum()
    assert n_massive > 0
    maps = similarity_maps(ranked)
    assert maps["lengths"] == [1, 3]
    for row, length in enumerate(maps["lengths"]):
        for column, start in enumerate(maps["starts"]):
            own = [one for span, one in ranked.items() if (span.start, len(span)) == (start, length)]
            assert maps["token_cosine"][row][column] == (own[0].tokens if own else None)
            assert maps["channel_cosine"][row][column] == (own[0].channels if own else None)
    tokens.mask[1, T // 2 :] = True
