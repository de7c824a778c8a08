"""The agreement with the authors' code, of accelerated models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prelar_trl.fast import accelerate
from tests.parity import Fixture
from tests.test_parity import (  # noqa: F401
    dtype,
    fixture,
    load_model,
    test_gradients_agree,
    test_imagination_and_behavior_agree,
    test_one_whole_training_step_agrees,
    test_outputs_losses_and_buffers_agree,
)


@pytest.fixture
def model(fixture: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:  # noqa: F811
    return accelerate(load_model(fixture, tmp_path, monkeypatch))
