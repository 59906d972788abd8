"""Digests and finiteness of tensors' bytes, against torch and plain hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from ghoststream.checkpoint import CheckpointIndex, TensorReader
from ghoststream.checkpoint.contents import CHUNK_BYTES, ContentCheck, TensorDigests
from ghoststream.checkpoint.dtypes import DTYPES
from ghoststream.errors import CheckpointError, NumericsError

pytestmark = pytest.mark.unit
FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_floating_point]


def _is_finite(values: torch.Tensor, *, may_be_infinite: bool = False) -> bool:
    name = next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
    check = ContentCheck("a", name, Path("file"), may_be_infinite=may_be_infinite)
    try:
        check.update(memoryview(values.view(torch.uint8).numpy()))
    except NumericsError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in FLOATS if DTYPES[name].itemsize < 4])
def test_every_bit_pattern_is_judged_as_torch_judges_it(name: str) -> None:
    size = DTYPES[name].itemsize
    patterns = torch.arange(256**size, dtype=torch.int64).to({1: torch.uint8, 2: torch.uint16}[size])
    values = patterns.view(DTYPES[name])
    wide = values.float()
    for allowed, wanted in ((False, wide.isfinite()), (True, ~wide.isnan())):
        some = torch.arange(len(values))[:: 1 if size == 1 else 61]
        odd = torch.nonzero(~wide.isfinite()).flatten()
        for index in torch.cat([some, odd[:: max(1, len(odd) // 50)]]).tolist():
            found = _is_finite(values[index : index + 1], may_be_infinite=allowed)
            assert found == bool(wanted[index]), (name, index)
    finite = values.view(torch.uint8 if size == 1 else torch.int16)[wide.isfinite()].view(DTYPES[name])
    assert _is_finite(finite)


@pytest.mark.parametrize("name", ["F32", "F64"])
@pytest.mark.parametrize(
    "value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0]
)
def test_wide_dtypes(name: str, value: float) -> None:
    values = torch.zeros(5, dtype=DTYPES[name])
    values[3] = value
    assert _is_finite(values) == np.isfinite(value)
    assert _is_finite(values, may_be_infinite=True) == (not np.isnan(value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_digests_do_not_depend_on_the_way(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    values = (torch.arange(size) % 100).to(dtype)
    save_file({"x": torch.ones(3), "a": values}, tmp_path / "model.safetensors")
    wanted = xxhash.xxh3_128_hexdigest(values.view(torch.uint8).numpy().tobytes())
    with TensorReader(CheckpointIndex.open(tmp_path)) as reader:
        assert torch.equal(reader.read("a"), values)
        assert reader.check("a") == f"xxh3_128:{wanted}"
        assert b"".join(map(bytes, reader.chunks("a", memoryview(bytearray(1000))))) == bytes(
            values.view(torch.uint8).numpy()
        )


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    values = torch.zeros(CHUNK_BYTES)
    values[-1] = torch.inf
    save_file({"a": values, "mask": values.clone()}, tmp_path / "model.safetensors")
    with TensorReader(CheckpointIndex.open(tmp_path), buffers={"mask"}) as reader:
        for read in (reader.read, reader.check):
            with pytest.raises(NumericsError, match=r"tensor a in .*model\.safetensors holds infinity \(1 "):
                read("a")
        assert torch.equal(reader.read("mask"), values)


def test_a_dtype_that_is_too_small_for_a_weight_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.full((4, 4), 1e6)}, tmp_path / "model.safetensors")
    with TensorReader(CheckpointIndex.open(tmp_path)) as reader:
        for read in (
            lambda: reader.read("a", torch.float16),
            lambda: reader.read_into("a", torch.empty(4, 4, dtype=torch.float16)),
            lambda: reader.rows("a", torch.tensor([1]), torch.float16),
        ):
            with pytest.raises(NumericsError, match=r"tensor a .* does not fit the range of torch\.float16"):
                read()
        assert torch.equal(reader.read("a", torch.bfloat16), torch.full((4, 4), 1e6).bfloat16())


def test_digests_of_two_times_must_agree() -> None:
    digests = TensorDigests(Path("model"))
    digests.expect({"a": "1", "b": "2"}, "it was captured")
    assert set(digests.unread()) == {"a", "b"}
    digests.note("a", "1")
    digests.note("c", "3")
    assert digests.unread() == ("b",)
    assert digests.missing(["a", "b", "c", "d"]) == ("b", "d")
    assert digests.of(["c", "a", "d"]) == {"a": "1", "c": "3"}
    with pytest.raises(CheckpointError, match="base changed since it was captured: tensor b in model"):
        digests.note("b", "4")
    with pytest.raises(CheckpointError, match="base changed since it was fitted: tensor c in model"):
        digests.expect({"c": "4"}, "it was fitted")
