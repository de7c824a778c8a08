"""Play episodes with a fine-tuned agent: success rate, return, video.

python recipes/evaluate.py run=runs/a episodes=50
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("evaluate"))

from typing import Any, cast

import numpy as np
import torch

from prelar_trl.envs import make_env
from prelar_trl.fast import accelerate
from prelar_trl.models import Agent, make_model
from prelar_trl.modules import StatefulPolicy
from prelar_trl.pretrained import load_weights
from prelar_trl.recipes.common import (
    check_trust,
    checkpoint_file,
    choose_device,
    play,
    read_run,
    seed_everything,
    summarize,
)
from prelar_trl.recipes.environments import build_env, check_interface, interface, saved_interface
from prelar_trl.recipes.interaction import evaluation_policy
from prelar_trl.recipes.schema import EvaluateConfig
from prelar_trl.record import bootstrap_interval, write_video
from prelar_trl.utils import write_json


def evaluate(cfg: EvaluateConfig, env_factory: Any = make_env) -> dict[str, Any]:
    """Write ``evaluation.json`` and ``videos/evaluation.mp4`` into the run; returns the numbers.

    ``env_factory`` is the one of :func:`prelar_trl.recipes.finetune.finetune`.
    """
    device = choose_device(cfg.device)
    seed_everything(cfg.seed)
    run, checkpoint = read_run(
        cfg.run, trust_code=cfg.trust_code, checkpoint=checkpoint_file(cfg.checkpoint)
    )
    if checkpoint["phase"] != "finetune":
        raise ValueError(f"run={cfg.run} is a {checkpoint['phase']} run; evaluate a finetune run")
    agent = cast(Agent, make_model(checkpoint))
    load_weights(agent, checkpoint["agent"], f"run={cfg.run}")
    accelerate(agent.to(device).eval())
    trained = run.config
    noise, state_mean = trained.get("eval_noise", 0.0), trained.get("eval_state_mean", False)
    policy = evaluation_policy(agent, noise, state_mean)
    name = cfg.env or trained["env"]
    if cfg.env is None:
        check_trust(cfg.run, "env", name, cfg.trust_code)
    same = ("camera", "cameras", "vectors", "action_repeat", "max_steps")
    env = build_env(
        env_factory,
        name,
        seed=cfg.seed,
        pixels=trained.get("pixels", 64),
        render_quality=cfg.render_quality or trained["render_quality"],
        num_workers=min(cfg.num_workers, cfg.episodes),
        **{option: trained.get(option) for option in same},
    )
    check_interface(name, interface(env), cfg.run, saved_interface(checkpoint))
    records, clips = play(env, StatefulPolicy(policy, device), cfg.episodes, cfg.video_episodes)
    env.close(raise_if_closed=False)

    total = summarize(records)
    returns = [record["return"] for record in records]
    result = {
        "env": name,
        "episodes": cfg.episodes,
        "seed": cfg.seed,
        "step": checkpoint["step"],
        "success": total["success"],
        "success_interval": [total["success_low"], total["success_high"]],
        "return": total["return"],
        "return_interval": list(bootstrap_interval(returns, statistic=np.mean)),
        "records": records,
    }
    write_json(run.path / "evaluation.json", result)
    if clips:
        write_video(run.videos / "evaluation.mp4", torch.cat(clips), fps=30)
    return result


def main(cfg: EvaluateConfig) -> None:
    """Entry point."""
    result = evaluate(cfg)
    low, high = result["success_interval"]
    video = f", {cfg.run}/videos/evaluation.mp4" if cfg.video_episodes else ""
    print(
        f"{result['env']}: success {result['success']:.2f} [{low:.2f}, {high:.2f}] (95%), "
        f"return {result['return']:.1f}, {cfg.episodes} episodes; "
        f"{cfg.run}/evaluation.json{video}"
    )
