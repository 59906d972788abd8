"""Peak memory of the way back on a checkpoint much larger than it, held against what it states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
_MIB = 2**20
# What Python objects and the threads' stacks take besides the buffers that are accounted for.
_SLACK = 4 * _MIB

# In a process of its own, on a tiny model first, so that what libraries allocate on first use is not counted.
_SCRIPT = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from ghoststream.options import Compute, Text
from ghoststream.progress import SilentProgress
from ghoststream.stages.choosing.taylor import taylor_scores
from ghoststream.stages.session import ModelSession
from ghoststream.streaming.budget import layer_work_bytes
from ghoststream.testing.memory import PeakAnonymous
from ghoststream.testing.synthetic import save_ids, save_synthetic

root, length, micro_batch, vocabulary = Path(sys.argv[1]), 64, 2, 4096
torch.set_num_threads(1)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256}

def scores(model, text, sequences, limit=None):
    session = ModelSession(model, Compute(host_memory=limit, scratch=root))
    tokens = session.tokens(Text(spec=text, sequences=sequences, length=length), SilentProgress())
    return taylor_scores(session, tokens, micro_batch=micro_batch, progress=SilentProgress())

tiny = save_synthetic(root / "tiny", **sizes, dtype=torch.float32)
deep = save_synthetic(root / "deep", num_hidden_layers=10, vocab_size=vocabulary, dtype=torch.float32)
scores(tiny, save_ids(root / "tiny.npy", sequences=4, length=length, vocab_size=256), 4)
for out, into in ((512, 512), (128, 512), (1408, 512), (512, 1408), (vocabulary, 512)):
    states = torch.ones(micro_batch, length, into, requires_grad=True)
    torch.nn.functional.linear(states, torch.ones(out, into, requires_grad=True)).sum().backward()
skeleton = ModelSession(deep).skeleton
unit = skeleton.unit_bytes
work = micro_batch * length * layer_work_bytes(skeleton, length)
gradients = unit + 4 * 1408 * 512
limit = 2 * unit + max(unit // 2, work) + 3 * work + gradients
text = save_ids(root / "ids.npy", sequences=8, length=length, vocab_size=vocabulary)
peaks = []
for sequences in (2, 8):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with PeakAnonymous() as peak:
        scores(deep, text, sequences, limit)
    peaks.append(peak.above_baseline_bytes)
checkpoint = skeleton.index.n_bytes
print(json.dumps({"peaks": peaks, "limit": limit, "checkpoint": checkpoint}))
"""


def test_gradients_take_two_layers_and_those_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout)
    few, many = figures["peaks"]
    assert figures["checkpoint"] > 2 * figures["limit"]
    # 2.5 layers, the gradients of one, four forwards of 128 tokens: 55 of 124 MiB. The states of six more
    # sequences, once a layer, would be 8 MiB more.
    assert few < figures["limit"] + _SLACK, figures
    assert many - few < _SLACK, figures
