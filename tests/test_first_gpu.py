"""What a recipe sets for a GPU, seen without one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from prelar_trl.fast import use_tensor_cores
from prelar_trl.recipes.common import choose_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Two GPUs that torch believes in; what sets the current one."""
    chosen = mock.Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    for flags, name in ((torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32")):
        monkeypatch.setattr(flags, name, getattr(flags, name))
    yield chosen
    torch.set_float32_matmul_precision("highest")


def test_the_gpu_that_is_named_becomes_the_current_one(gpus) -> None:
    assert choose_device("cuda:1") == torch.device("cuda:1")
    gpus.assert_called_once_with(torch.device("cuda:1"))


def test_processes_of_torchrun_take_a_gpu_each(gpus, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")


def test_more_processes_than_gpus_is_an_error(gpus, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="torch sees only 2 GPUs here"):
        choose_device("cuda")


def test_float32_uses_the_tensor_cores_of_a_gpu_only(gpus) -> None:
    use_tensor_cores(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    choose_device("cuda")
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
