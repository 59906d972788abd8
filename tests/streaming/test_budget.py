"""What a pass may take: the micro-batch that fits, the parts that are counted, the refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.costs import beside_work_bytes, sequences_at_work, staging_bytes
from ghoststream.errors import BudgetError
from ghoststream.streaming import MemoryBudget, PassMemory, Skeleton, make_batches
from ghoststream.testing.conformance import random_tokens

pytestmark = pytest.mark.unit
GIB = 2**30
LENGTH = 2048
# A layer of Llama 70B in bfloat16 at work: (4 * 28,672 + 8 * 8,192) * 2 bytes a token; U is the embedding.
UNIT_70B, WORK_70B, STATES_70B = 128_256 * 8192 * 2, 360_448 * LENGTH, 8192 * 2 * LENGTH
UNIT_8B, WORK_8B, STATES_8B = 128_256 * 4096 * 2, (4 * 14_336 + 8 * 4096) * 2 * LENGTH, 4096 * 2 * LENGTH


@pytest.mark.parametrize(
    ("unit", "work", "states"), [(UNIT_70B, WORK_70B, STATES_70B), (UNIT_8B, WORK_8B, STATES_8B)]
)
def test_an_accelerator_is_given_8192_tokens_and_a_processor_2048(unit: int, work: int, states: int) -> None:
    assert sequences_at_work(unit, work, LENGTH, 72 * GIB, states) * LENGTH == 8192
    assert sequences_at_work(unit, work, LENGTH, 72 * GIB) * LENGTH == 2048


def test_a_small_card_gets_as_many_tokens_as_it_has_memory_for() -> None:
    limit = 2 * UNIT_70B + 2 * (WORK_70B + 7 * STATES_70B) + 64 * 2**20
    assert sequences_at_work(UNIT_70B, WORK_70B, LENGTH, limit, STATES_70B) == 2
    assert sequences_at_work(UNIT_70B, WORK_70B, LENGTH, limit - 1, STATES_70B) == 1


def test_what_is_counted_beside_the_work() -> None:
    assert staging_bytes(5) == 8 + 5
    assert beside_work_bytes(1000) == 7000 + 64 * 2**20


def test_the_refusal_names_the_option(tiny_llama: Path) -> None:
    skeleton = Skeleton(tiny_llama)
    ids, _ = random_tokens(skeleton, 2, 8, padding="none")
    memory = PassMemory(skeleton, MemoryBudget(host_bytes=skeleton.unit_bytes), 8)
    with pytest.raises(BudgetError, match=r"needs .* of host memory .* or give --host-memory where"):
        memory.states_factory(make_batches(ids, None, 1))


def test_what_a_way_back_takes_leaves_less_to_fits(tiny_llama: Path) -> None:
    skeleton = Skeleton(tiny_llama)
    there = PassMemory(skeleton, MemoryBudget(), 16, micro_batch=2)
    and_back = PassMemory(skeleton, MemoryBudget(), 16, gradients=1000, micro_batch=2)
    # Three times the work of a forward, which is (4 I + 8 C) numbers a token, and the gradients.
    work = 2 * 16 * (4 * 64 + 8 * 32) * 4
    assert and_back.taken()[0] - there.taken()[0] == 3 * work + 1000
