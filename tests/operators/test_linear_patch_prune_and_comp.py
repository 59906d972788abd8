"""LinearPatch in the rotated basis and Prune&Comp against their definitions; Hadamard matrices against
theirs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg

from ghoststream.errors import RequestError
from ghoststream.operators import make_operator, operator_names
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryReducer, MomentSpec, hadamard_factors, hadamard_matrix, rotate
from ghoststream.statistics.rotation import RotatedReducer
from ghoststream.statistics.source import open_source
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.peak import Peak
from tests.helpers.reducing import moments_of
from tests.helpers.requests import fit

pytestmark = pytest.mark.unit
SHAPE = (6, 10, 12)  # twelve channels: no power of two
SPAN = Span(1, 3)
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    made = random_states(4, SHAPE)
    made[3][..., 2] *= 3.0  # a channel that grows much more than the others
    return made


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    folder = tmp_path_factory.mktemp("baselines") / "store"
    return store_of(folder, states, mask=ragged_mask(*SHAPE[:2]))


def scales(states: list[Hidden], turn: Array) -> Array:
    """LinearPatch's code: per sequence mean_t |y H| / mean_t |x H|, mean over sequences."""
    mask = ragged_mask(*SHAPE[:2])
    found = [
        np.abs(states[3][i][mask[i]].astype(np.float64) @ turn).mean(0)
        / np.abs(states[1][i][mask[i]].astype(np.float64) @ turn).mean(0)
        for i in range(SHAPE[0])
    ]
    result: Array = np.mean(found, axis=0)
    return result


def data(states: list[Hidden]) -> tuple[Array, Array]:
    mask = ragged_mask(*SHAPE[:2])
    return states[1][mask].astype(np.float64), states[3][mask].astype(np.float64)


PUBLISHED_SIGNS = {
    12: "d1026a5e7abe32ab",
    20: "feb437edd08fcdff",
    28: "90e9b61e93164eb5",
    36: "147097e41d5a3707",
    40: "5f9dd4108260cd3c",
    60: "b362e489b63dc917",
    64: "ce50b224875b473e",
    108: "e9458e07a082d294",
    140: "d6b2c17a5b11a0aa",
    160: "8c2208371981f415",
    576: "06bf627776509335",
    896: "17b98be470227655",
}
"""Of ``get_hadamard_matrix`` in LinearPatch's code (commit d1274e8): first digits of SHA-256 of ``H > 0``."""


@pytest.mark.parametrize("order", PUBLISHED_SIGNS)
def test_hadamard_matrices_are_those_of_the_published_code(order: int) -> None:
    signs = (hadamard_matrix(order) > 0).astype(np.uint8)
    assert hashlib.sha256(signs.tobytes()).hexdigest()[:16] == PUBLISHED_SIGNS[order]


@pytest.mark.parametrize(
    "order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 64, 68, 76, 80, 84, 96, 144, 200, 256, 400, 576]
)
def test_hadamard_matrices_have_entries_of_one_size_and_orthogonal_rows(order: int) -> None:
    found = hadamard_matrix(order) * np.sqrt(order)
    np.testing.assert_allclose(np.abs(found), 1.0, atol=1e-12)
    np.testing.assert_allclose(found @ found.T, order * np.eye(order), atol=1e-9)
    whole: Array = np.eye(1)
    for factor in hadamard_factors(order):
        whole = np.kron(whole, factor).astype(np.float64)
    np.testing.assert_allclose(found, whole, atol=1e-12)


@pytest.mark.parametrize("order", [2, 16, 512])
def test_of_powers_of_two_they_are_sylvesters(order: int) -> None:
    expected = scipy.linalg.hadamard(order) / np.sqrt(order)
    np.testing.assert_allclose(hadamard_matrix(order), expected, atol=1e-14)


@pytest.mark.parametrize(
    "size", [576, 768, 896, 960, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 5120, 6656, 7168, 8192]
)
def test_hidden_sizes_of_models_can_be_rotated(size: int) -> None:
    states = np.random.default_rng(0).standard_normal((3, size))
    turned = rotate(states)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(states, axis=1))
    np.testing.assert_allclose(turned @ turned.T, states @ states.T, atol=1e-8)
    np.testing.assert_allclose(np.abs(rotate(np.eye(1, size))), 1 / np.sqrt(size))


@pytest.mark.parametrize("size", [0, 3, 6, 10, 52, 92, 188])
def test_sizes_without_a_known_matrix_are_refused_with_those_that_work(size: int) -> None:
    with pytest.raises(
        RequestError, match=rf"no Hadamard matrix of order {size} is known .* work are 576, 768"
    ):
        hadamard_factors(size)


def test_a_model_that_cannot_be_rotated_is_refused_before_the_work(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (4, 5, 6)))
    with pytest.raises(RequestError, match="no Hadamard matrix of order 6"):
        fit("0:1", store=uri, operator="linear-patch-rotated", out=tmp_path / "o.safetensors")
    with pytest.raises(RequestError, match="reduce them without Grams"):
        RotatedReducer((Span(0, 1),), grams=True)


def test_linear_patch_rotated_is_its_definition(uri: str, states: list[Hidden], tmp_path: Path) -> None:
    made = fit("1:3", store=uri, operator="linear-patch-rotated", out=tmp_path / "operators.safetensors")
    (operator,) = made.boundaries
    turn = hadamard_matrix(SHAPE[2])
    x, y = data(states)
    expected = x @ turn @ np.diag(scales(states, turn)) @ turn.T
    assert (operator.form, operator.features) == ("linear", "hidden")
    np.testing.assert_allclose(operator.apply(x), expected, rtol=1e-5, atol=1e-6)
    residual = np.linalg.norm(expected - y) / np.linalg.norm(y - x)
    assert operator.diagnostics["relative_residual"] == pytest.approx(residual, rel=1e-8)
    assert operator.diagnostics["relative_residual_out_of_sample"] is not None
    # Taking the scales in the basis of the model, as one published implementation does, is another map.
    unturned = x @ turn @ np.diag(scales(states, np.eye(SHAPE[2]))) @ turn.T
    assert np.linalg.norm(unturned - expected) > 0.01 * np.linalg.norm(expected)


def test_rotated_statistics_are_those_of_rotated_states(
    uri: str, states: list[Hidden], tmp_path: Path
) -> None:
    turned = [rotate(part.reshape(-1, SHAPE[2]).astype(np.float64)).reshape(SHAPE) for part in states]
    other = store_of(tmp_path / "store", turned, mask=ragged_mask(*SHAPE[:2]))
    for weights in ("uniform", "relative"):
        found, expected = (
            moments_of(place, [SPAN], kind, grams=False, token_weights=weights)[SPAN].total()
            for place, kind in ((uri, RotatedReducer), (other, BoundaryReducer))
        )
        for name, array in expected.state.arrays.items():
            np.testing.assert_allclose(found.state.arrays[name], array, rtol=1e-4, atol=1e-3, err_msg=name)


def test_rotated_statistics_stay_within_the_stated_memory(tmp_path: Path) -> None:
    hidden = 192
    source = open_source(store_of(tmp_path / "store", random_states(2, (16, 128, hidden))))
    reducer = RotatedReducer((Span(0, 2),), MomentSpec(block_tokens=512), grams=False)
    reducer.reduce(source, 0, 4)
    with Peak() as peak:
        reducer.reduce(source, 0, 16)
    assert peak.bytes < 1.1 * reducer.task_bytes(hidden, 128)


def test_prune_and_comp_is_one_scale_the_mean_of_all_ratios(
    uri: str, states: list[Hidden], tmp_path: Path
) -> None:
    made = fit("1:3", store=uri, operator="prune-and-comp", out=tmp_path / "operators.safetensors")
    (operator,) = made.boundaries
    factor = scales(states, np.eye(SHAPE[2])).mean()
    x, y = data(states)
    assert operator.form == "diagonal"
    np.testing.assert_allclose(operator.apply(x), factor * x, rtol=1e-6)
    residual = np.linalg.norm(factor * x - y) / np.linalg.norm(y - x)
    assert operator.diagnostics["relative_residual"] == pytest.approx(residual, rel=1e-8)


def test_the_command_line_knows_every_family_that_comes_with_the_library() -> None:
    own = {name for name in operator_names() if not name.endswith("for-a-test")}
    text = str(Method.model_fields["operator"].description)
    for name in own - {"mean-gap"}:
        assert name in text
        make_operator(Method(operator=name))
