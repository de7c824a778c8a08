"""An environment that never ends is named before anything waits for its end."""

from __future__ import annotations

import pytest

from prelar_trl.envs import ToyEnv
from prelar_trl.recipes.finetune import finetune
from tests.toy_runs import finetune_config


def test_without_a_prefill_it_is_named_before_the_first_evaluation(tmp_path) -> None:
    options = {"prefill": 0, "eval_every": 25, "env_steps": 10_000, "max_steps": None}
    with pytest.raises(ValueError, match="no episode has ended in 25 steps.*give max_steps"):
        finetune(finetune_config(tmp_path / "a", **options), env_factory=lambda: ToyEnv())
