"""A pytest plugin: the whole session has a CUDA device that is not there (``-p tests.late_cuda.plugin``).

Every test runs in the first of the orders that ``LATE_CUDA_ORDERS`` lists. Those of the file that
``LATE_CUDA_THOROUGH`` names, or of all files if it names none, run once in each. A test fails, too, if memory
was given back while a stream still worked on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.late_cuda import hooks

# Before anything imports torch. Kernels run in whichever thread waits, and each must compute with one core.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
_HOOKS = hooks.load()

import pytest  # noqa: E402

from tests.late_cuda.device import LateCuda  # noqa: E402

ORDERS = os.environ.get("LATE_CUDA_ORDERS", "late").split(",")
THOROUGH = os.environ.get("LATE_CUDA_THOROUGH", "")
DEVICE = LateCuda(_HOOKS)
DEVICE.start()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test its orders."""
    thorough = THOROUGH in metafunc.module.__file__
    metafunc.parametrize("late_cuda", ORDERS if thorough else ORDERS[:1], indirect=True)


@pytest.fixture(autouse=True)
def late_cuda(request: pytest.FixtureRequest) -> Iterator[LateCuda]:
    """The device, as if nobody had used it before; its streams in the order of this run."""
    DEVICE.reset(request.param)
    yield DEVICE
    found = list(DEVICE.memory.violations)
    DEVICE.reset("eager")
    assert not found
