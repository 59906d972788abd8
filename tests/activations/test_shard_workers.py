from __future__ import annotations

import threading

import pytest

from ghoststream.activations.shard_workers import ShardWorkers

pytestmark = pytest.mark.unit
WAIT_SECONDS = 60.0


def test_memory_serves_again_and_no_more_is_worked_on_than_there_are_threads() -> None:
    workers = ShardWorkers(2)
    gate = threading.Event()
    buffers = [workers.take(100) for _ in range(3)]
    assert len({buffer.data_ptr() for buffer in buffers}) == 3
    first, second = (workers.submit(buffer, lambda: gate.wait(WAIT_SECONDS)) for buffer in buffers[:2])
    third = threading.Thread(target=workers.submit, args=(buffers[2], lambda: None))
    third.start()
    third.join(timeout=0.2)
    assert third.is_alive()
    gate.set()
    third.join(WAIT_SECONDS)
    assert (first.result(), second.result()) == (True, True)
    workers.close()


def test_a_buffer_is_given_back_after_an_error_and_a_smaller_one_is_replaced() -> None:
    workers = ShardWorkers(1)
    buffer = workers.take(100)

    def fail() -> None:
        msg = "broken"
        raise OSError(msg)

    with pytest.raises(OSError, match="broken"):
        workers.submit(buffer, fail).result()
    assert workers.take(80).data_ptr() == buffer.data_ptr()
    workers.give_back(buffer)
    assert len(workers.take(101)) == 101
    workers.close()
