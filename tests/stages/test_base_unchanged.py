"""The base stays the base: any byte of it that changed is found by the next use, by the tensor's name."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

import ghoststream
from ghoststream import costs
from ghoststream.activations import ActivationStore
from ghoststream.checkpoint import CheckpointIndex, TensorReader, writer
from ghoststream.errors import CheckpointError, MismatchError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Compute, Method, Search, Source, Storage, Text
from ghoststream.recovery import load_recovered
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.store_observer import StoreObserver
from ghoststream.stages.export import export
from ghoststream.statistics import store_digest
from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import BROKEN_DATA, run, succeed

pytestmark = pytest.mark.integration
LENGTH = 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(model: Path, name: str, seed: int = 0) -> None:
    """Change one bit of the last mantissa byte of one value, far from the middle of the tensor."""
    entry = CheckpointIndex.open(model).tensors[name]
    place = random.Random(f"{name} {seed}").randrange(entry.n_bytes // 8) * 4  # float32, little-endian
    with (model / entry.shard).open("r+b") as file:
        file.seek(entry.offset + place)
        old = file.read(1)
        file.seek(entry.offset + place)
        file.write(bytes([old[0] ^ 1]))


def changed_since(name: str) -> Any:
    return pytest.raises(CheckpointError, match=rf"changed since .*tensor {name} .*other bytes")


def digest(model: Path, name: str) -> str:
    entry = CheckpointIndex.open(model).tensors[name]
    raw = (model / entry.shard).read_bytes()[entry.offset : entry.offset + entry.n_bytes]
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw)}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    # Tensors of more than a kibibyte, which the fingerprint samples in the middle only.
    return save_tiny("llama", tmp_path / "model", hidden_size=64, tie_word_embeddings=False)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(4, 128, (8, LENGTH)))
    return Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=8, length=LENGTH)


def _fit(store: Path, plan: str, out: Path) -> OperatorSet:
    return ghoststream.fit(plan, Source(store=str(store)), out=out)


def test_a_digest_is_that_of_the_bytes_however_they_are_read(model: Path) -> None:
    reads: tuple[Callable[[TensorReader], Any], ...] = (
        lambda reader: reader.read(EMBEDDING),
        lambda reader: reader.read(EMBEDDING, torch.float64),
        lambda reader: reader.read_into(EMBEDDING, torch.empty(64, 128).T),
        lambda reader: reader.rows(EMBEDDING, torch.tensor([3])),
        lambda reader: list(reader.chunks(EMBEDDING, memoryview(bytearray(40)))),
        lambda reader: reader.check(EMBEDDING),
    )
    for read in reads:
        with TensorReader(CheckpointIndex.open(model)) as reader:
            read(reader)
            assert reader.digests.of([EMBEDDING]) == {EMBEDDING: digest(model, EMBEDDING)}


def test_every_artifact_knows_the_tensors_that_it_was_made_of(
    model: Path, text: Text, tmp_path: Path
) -> None:
    store = ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    everything = {name: digest(model, name) for name in CheckpointIndex.open(model).tensors}
    passed = {name: value for name, value in everything.items() if name != HEAD}
    assert store.annotations["base_tensors"] == passed
    operators = _fit(tmp_path / "store", "2:4", tmp_path / "o.safetensors")
    assert operators.metadata["base"]["tensors"] == passed
    plan = ghoststream.select(2, Source(store=str(tmp_path / "store")), out=tmp_path / "plan.json")
    assert Selection.load(tmp_path / "plan.json").base == plan.base
    assert plan.base["tensors"] == passed
    export(model, operators, tmp_path / "out")
    info = load_recovered(tmp_path / "out")
    assert info is not None
    assert info.base["tensors"] == everything
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert info.digests == {
        name: f"xxh3_128:{xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())}"
        for name, tensor in written.items()
    }


def test_a_measured_plan_and_its_operators_know_the_tensors(model: Path, text: Text, tmp_path: Path) -> None:
    source = Source(model=str(model), calibration=text)
    search = Search(criterion="sleb")
    plan = ghoststream.select(2, source, search=search, out=tmp_path / "plan.json")
    everything = {name: digest(model, name) for name in CheckpointIndex.open(model).tensors}
    assert plan.base["tensors"] == everything
    operators = ghoststream.fit(
        "2:4", source, method=Method(operator="ghost"), out=tmp_path / "operators.safetensors"
    )
    behind = ("model.layers.4.", "model.layers.5.", HEAD)
    assert operators.metadata["base"]["tensors"] == {
        name: value for name, value in everything.items() if not name.startswith(behind)
    }
    change(model, "model.layers.4.mlp.up_proj.weight")
    with changed_since("model.layers.4.mlp.up_proj.weight"):
        ghoststream.fit(tmp_path / "plan.json", source, out=tmp_path / "again.safetensors")


def test_every_tensor_that_changed_is_refused_by_export(model: Path, text: Text, tmp_path: Path) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    operators = _fit(tmp_path / "store", "2:4", tmp_path / "o.safetensors")
    names = sorted(operators.metadata["base"]["tensors"])
    for name in names[:: max(1, len(names) // 12)]:  # of removed layers too
        other = Path(shutil.copytree(model, tmp_path / "other"))
        change(other, name)
        with changed_since(name):
            export(other, operators, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        shutil.rmtree(other)
    export(model, operators, tmp_path / "out")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_every_tensor_that_changed_is_refused_by_every_use(
    model: Path, text: Text, tmp_path: Path, seed: int
) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    operators = _fit(tmp_path / "store", "2:4", tmp_path / "o.safetensors")
    export(model, operators, tmp_path / "recovered")
    for name in operators.metadata["base"]["tensors"]:
        other = Path(shutil.copytree(model, tmp_path / "other"))
        change(other, name, seed)
        with changed_since(name):
            export(other, operators, tmp_path / "out")
        with changed_since(name):
            ghoststream.evaluate([other], store=tmp_path / "store")
        for made in (tmp_path / "recovered", tmp_path / "o.safetensors"):
            with changed_since(name):
                ghoststream.evaluate([other, made], text=text)
            report = run("verify", made, "--model", other)
            assert (report.exit_code, name in report.stdout) == (BROKEN_DATA, True)
        shutil.rmtree(other)


@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.mlp.up_proj.weight"])
def test_an_interrupted_capture_does_not_go_on_with_another_base(
    model: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    finished = StoreObserver.finished

    def interrupted(self: StoreObserver, position: int) -> None:
        finished(self, position)
        if position == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreObserver, "finished", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    monkeypatch.undo()
    committed = ActivationStore.open(str(tmp_path / "store")).completed_layers()
    change(model, name)
    with changed_since(name):
        ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    assert ActivationStore.open(str(tmp_path / "store")).completed_layers() == committed
    change(model, name)  # as it was
    assert ghoststream.capture(model, calibration=text, store=tmp_path / "store").complete


def test_workers_of_different_bases_are_told_apart(
    model: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shards of one sequence, so that there is something to share.
    monkeypatch.setattr(costs, "SHARD_BYTES", 1)
    name, compute = "model.layers.1.mlp.up_proj.weight", Compute(micro_batch=1)

    def capture(worker: int) -> None:
        storage = Storage(layers=(0, 2))
        share: dict[str, Any] = {"storage": storage, "compute": compute, "worker": (worker, 2)}
        ghoststream.capture(model, calibration=text, store=tmp_path / "store", **share)

    capture(1)
    change(model, name)
    with pytest.raises(MismatchError, match=rf"{name}\): the base changed since they began"):
        capture(2)


def test_notes_of_a_search_on_another_base_are_not_continued(
    model: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Source(model=str(model), calibration=text), tmp_path / "plan.json"
    search = Search(criterion="sleb")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Selection, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        ghoststream.select(2, source, search=search, out=out)
    monkeypatch.undo()
    name = "model.layers.3.self_attn.o_proj.weight"
    change(model, name)
    with changed_since(name):
        ghoststream.select(2, source, search=search, out=out)
    change(model, name)
    assert ghoststream.select(2, source, search=search, out=out).plan.n_removed == 2


def test_a_recovered_checkpoint_that_changed_is_refused(model: Path, text: Text, tmp_path: Path) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    export(model, _fit(tmp_path / "store", "2:4", tmp_path / "o.safetensors"), tmp_path / "out")
    ghoststream.evaluate([tmp_path / "out"], text=text)
    name = "model.layers.1.mlp.down_proj.weight"
    change(tmp_path / "out", name)
    with pytest.raises(CheckpointError, match=f"recovered checkpoint changed since .*{name}"):
        ghoststream.evaluate([tmp_path / "out"], text=text)


def test_an_interrupted_export_does_not_keep_shards_of_another_base(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PruningPlan.parse(6, "2:4")
    nothing = OperatorSet(plan, "none", (BoundaryOperator(plan.spans[0], "identity"),), 64)
    write, calls = writer._write_shard, iter(range(100))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(writer, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        export(model, nothing, tmp_path / "out", max_shard_bytes=40_000)
    monkeypatch.undo()
    change(model, EMBEDDING)
    export(model, nothing, tmp_path / "out", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    written = load_file(tmp_path / "out" / index[EMBEDDING])[EMBEDDING]
    assert f"xxh3_128:{xxhash.xxh3_128_hexdigest(written.numpy().tobytes())}" == digest(model, EMBEDDING)


def test_verify_tells_whole_checkpoints_by_their_digest(model: Path, tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        return str(json.loads(succeed("verify", folder, "--json").stdout)["digest"])

    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert told(copy) == told(model)
    change(copy, HEAD)
    assert told(copy) != told(model)


def test_verify_compares_a_store_with_its_model(model: Path, text: Text, tmp_path: Path) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    succeed("verify", tmp_path / "store", "--model", model)
    change(model, EMBEDDING)
    report = run("verify", tmp_path / "store", "--model", model)
    assert report.exit_code == BROKEN_DATA
    assert f"the base changed since {tmp_path / 'store'} was made: tensor {EMBEDDING}" in report.stdout
    assert run("verify", model, "--model", model).exit_code == 2


def test_verify_says_in_one_line_that_a_model_is_another(model: Path, text: Text, tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    ghoststream.capture(model, calibration=text, store=store)
    save_tiny("llama", other, seed=1, hidden_size=64, tie_word_embeddings=False)
    # Only those that are read while a store is captured; norms are ones in both.
    names = [name for name in CheckpointIndex.open(model).tensors if name != HEAD]
    differ = [name for name in names if digest(model, name) != digest(other, name)]
    result = run("verify", store, "--model", other)
    assert result.exit_code == BROKEN_DATA
    broken = [line for line in result.stdout.splitlines() if line.startswith("broken")]
    first = min(differ, key=lambda name: CheckpointIndex.open(other).tensors[name].offset)
    says = f"{len(differ)} of {len(names)} tensors differ, {first} first"
    assert broken == [f"broken: {other} is not the model that {store} was made of: {says}"]
    problems = json.loads(run("verify", store, "--model", other, "--json").stdout)["problems"]
    assert sum("has other bytes" in problem for problem in problems) == len(differ)
    # Of a model that lacks all of them, nothing is read.
    save_tiny("gpt2", tmp_path / "gpt2")
    result = run("verify", store, "--model", tmp_path / "gpt2")
    assert f"{len(names)} of {len(names)} tensors differ" in result.stdout
    assert "reading tensors" not in result.stderr


def test_verify_prints_the_first_of_many_problems(model: Path, text: Text, tmp_path: Path) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    changed = [name for name in CheckpointIndex.open(model).tensors if "mlp" in name][:12]
    for name in changed:
        change(model, name)
    lines = run("verify", tmp_path / "store", "--model", model).stdout.splitlines()
    assert sum(line.startswith("broken: ") for line in lines) == 10
    assert lines[-2:] == ["and 2 more, which --json names", "12 problems found"]


def test_verify_compares_shards_of_a_hub_cache_with_their_names(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "main", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    for shard in snapshot.glob("*.safetensors"):
        blob = blobs / hashlib.sha256(shard.read_bytes()).hexdigest()
        shard.rename(blob)
        shard.symlink_to(blob)
    succeed("verify", snapshot)
    change(snapshot, HEAD)
    report = run("verify", snapshot)
    assert report.exit_code == BROKEN_DATA
    assert "is not what the hub has" in report.stdout


def test_a_base_that_changed_is_refused_beside_what_was_made_of_it(
    model: Path, text: Text, tmp_path: Path
) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    export(model, _fit(tmp_path / "store", "2:4", tmp_path / "o.safetensors"), tmp_path / "recovered")
    other = save_tiny("llama", tmp_path / "other", seed=1, hidden_size=64, tie_word_embeddings=False)
    names = [str(other), str(tmp_path / "recovered")]
    assert [row.model for row in ghoststream.evaluate(names, text=text).rows] == names
    # One within the fingerprint's sample, and one outside of it.
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"):
        change(model, name)
        for made in ("recovered", "o.safetensors"):
            for pair in ([model, tmp_path / made], [tmp_path / made, model]):
                with changed_since(name):
                    ghoststream.evaluate(pair, text=text)
        change(model, name)  # as it was


def test_a_copy_that_changed_is_measured_by_itself(model: Path, text: Text, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for name in (HEAD, "model.layers.2.mlp.up_proj.weight"):
        change(copy, name)
    together = ghoststream.evaluate([model, copy], text=text)
    apart = [ghoststream.evaluate([one], text=text).rows[0].losses for one in (model, copy)]
    assert [row.losses for row in together.rows] == apart


def test_a_plan_and_a_store_of_different_bases_are_not_combined(
    model: Path, text: Text, tmp_path: Path
) -> None:
    ghoststream.capture(model, calibration=text, store=tmp_path / "store")
    ghoststream.select(2, Source(store=str(tmp_path / "store")), out=tmp_path / "plan.json")
    name = "model.layers.0.mlp.gate_proj.weight"
    change(model, name)
    ghoststream.capture(model, calibration=text, store=tmp_path / "later")
    with changed_since(name):
        ghoststream.fit(
            tmp_path / "plan.json", Source(store=str(tmp_path / "later")), out=tmp_path / "o.safetensors"
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_a_plan_of_a_model_of_another_family_is_refused(model: Path, text: Text, tmp_path: Path) -> None:
    """No tensor of the two has the same name, and both have six layers."""
    other = save_tiny("gpt2", tmp_path / "other")
    source, plan = Source(model=str(model), calibration=text), tmp_path / "plan.json"
    chosen = ghoststream.select(2, source, search=Search(criterion="sleb"), out=plan)
    assert not set(chosen.base["tensors"]) & set(CheckpointIndex.open(other).tensors)
    refused = pytest.raises(MismatchError, match="is another model than when the plan was chosen")
    with refused:
        ghoststream.recover(other, remove=str(plan), calibration=text, out=tmp_path / "recovered")
    with refused:
        ghoststream.fit(plan, Source(model=str(other), calibration=text), out=tmp_path / "o.safetensors")
    ghoststream.capture(other, calibration=text, store=tmp_path / "store")
    with refused:
        ghoststream.fit(plan, Source(store=str(tmp_path / "store")), out=tmp_path / "o.safetensors")
    assert not (tmp_path / "recovered").exists()


def test_sums_of_a_store_that_was_captured_again_are_not_continued(
    model: Path, text: Text, tmp_path: Path
) -> None:
    before = store_digest(ghoststream.capture(model, calibration=text, store=tmp_path / "store"))
    shutil.rmtree(tmp_path / "store")
    change(model, "model.layers.0.mlp.gate_proj.weight")
    after = store_digest(ghoststream.capture(model, calibration=text, store=tmp_path / "store"))
    assert after != before
