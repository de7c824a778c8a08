"""Fine-tuning on an environment of one's own: any of gymnasium or TorchRL.

python examples/own_environment.py
"""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.schema import EvaluateConfig, FinetuneConfig


class Slider(gymnasium.Env):
    """Push a bright column to the middle of the picture."""

    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    STEPS = 50

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(-1, 1), 0
        return self._picture(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = float(np.clip(self.place + 0.1 * action[0], -1, 1))
        self.steps += 1
        info = {"success": abs(self.place) < 0.1}  # read as the success of the step
        return self._picture(), 1 - abs(self.place), False, self.steps == self.STEPS, info

    def _picture(self) -> np.ndarray:
        picture = np.full((64, 64, 3), 30, np.uint8)
        column = round((self.place + 1) * 28)
        picture[:, column : column + 8] = 220
        return picture


def main(folder: str | Path = "runs/own_environment", **settings: Any) -> None:
    """``settings`` are those of ``finetune.py``; ``pretrained=<run>`` begins from videos."""
    short = {
        "size": "mini",
        "env_steps": 3_000,
        "prefill": 500,
        "batch_size": 8,
        "batch_length": 16,
    }
    short |= {"eval_every": 1_000, "eval_episodes": 5, "pretrain_updates": 20}
    run = Path(folder) / "run"
    cfg = FinetuneConfig(method="dreamerv2", env="slider", run=str(run), **{**short, **settings})
    finetune(cfg, env_factory=Slider)
    evaluate(EvaluateConfig(run=str(run), episodes=2), env_factory=Slider)


if __name__ == "__main__":
    main()
