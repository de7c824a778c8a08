"""A process that has left its group ends as it should: no thread of the group outlives it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from prelar_trl.distributed import distribute, process_group
from prelar_trl.models import make_world_model_loss
from prelar_trl.updates import WorldModelUpdate
from tests.processes import gloo_threads, run_in_processes
from tests.tiny import batch, tiny_world_model

linux = pytest.mark.skipif(sys.platform != "linux", reason="lists threads as Linux does")


def shared_update() -> WorldModelUpdate:
    """An update that its group shares, and that has been made once."""
    loss = make_world_model_loss("prelar", "pretrain", tiny_world_model())
    update = distribute(WorldModelUpdate(loss), dist.group.WORLD)
    update(batch(2, 3))
    assert gloo_threads() or sys.platform != "linux"
    return update


def alone(folder: Path) -> dict:
    """A group of one process."""
    return {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}


@linux
def test_a_group_takes_its_threads_along(tmp_path) -> None:
    with process_group("gloo", **alone(tmp_path)):
        shared_update()
    assert not gloo_threads() and not dist.is_initialized()


@linux
def test_a_group_that_an_exception_leaves_takes_its_threads_along(tmp_path) -> None:
    def fail(update: WorldModelUpdate) -> None:
        try:
            raise OSError("disk full")
        except OSError as error:
            raise RuntimeError("not saved") from error

    with pytest.raises(RuntimeError, match="not saved"):
        with process_group("gloo", **alone(tmp_path)):
            fail(shared_update())
    assert not gloo_threads() and not dist.is_initialized()


def leave_while_a_thread_is_busy() -> bool:
    """In the second process; whether a thread of the group is what still has work, for a second."""
    shared_update()
    busy: list[int] = []
    started = threading.Event()

    def work(_: object) -> None:
        busy.append(threading.get_native_id())
        started.set()
        time.sleep(1)

    if dist.get_rank() == 0:
        dist.recv(torch.ones(1), 1)  # what the second has begun cannot end before
        dist.all_reduce(torch.ones(1))
    else:
        dist.all_reduce(torch.ones(1), async_op=True).get_future().then(work)
        dist.send(torch.ones(1), 0)
        started.wait(30)
    dist.all_reduce(torch.ones(1))  # by another thread
    return busy != [] and busy != [threading.get_native_id()]


def test_a_process_waits_for_the_threads_of_its_group_before_it_ends() -> None:
    # Else SIGABRT ends it: Python stops a thread that comes too late for its lock, within C++ code.
    assert run_in_processes(leave_while_a_thread_is_busy) == [False, True]
