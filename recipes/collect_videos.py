"""Roll out scripted experts into a clip store: video for pre-training, true actions kept apart.

python recipes/collect_videos.py data=videos/metaworld episodes=100

Episode i depends on the seed and on i alone, so that collecting can be interrupted, continued and
spread over processes without a difference in the result.
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("collect_videos"))

import multiprocessing
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import OneHot
from torchrl.envs import EnvBase

from prelar_trl.data import ClipStore, ClipWriter
from prelar_trl.envs import make_env, metaworld_tasks, toy_expert
from prelar_trl.recipes.environments import build_env
from prelar_trl.recipes.schema import CollectVideosConfig
from prelar_trl.record import Progress, check_space, contact_sheet, wilson_interval, write_picture
from prelar_trl.utils import end_with_parent, map_ahead

EVALUATION_TASKS = (
    "lever-pull",
    "drawer-open",
    "door-lock",
    "button-press-topdown-wall",
    "reach",
    "dial-turn",
)
ENV_SETTINGS = ("camera", "render_quality", "pixels", "action_repeat", "max_steps")
SHEET_EPISODES, SHEET_FRAMES = 8, 8
Expert = Callable[[TensorDictBase], np.ndarray]


class Episode(NamedTuple):
    """One rollout: frames uint8 [T,3,H,W], actions float32 [T,A] (that led to each frame)."""

    frames: np.ndarray
    actions: np.ndarray
    label: str
    success: bool
    expert: bool


def env_names(env: str, tasks: str | Sequence[str]) -> list[str]:
    """The environments to collect from, by their names for ``make_env``.

    Raises:
        ValueError: unknown or no tasks.
    """
    if env != "metaworld":
        return [env]
    known = metaworld_tasks()
    if not isinstance(tasks, list | tuple):
        name = str(tasks)
        tasks = {"evaluation": EVALUATION_TASKS, "all": known}.get(name, [name])
    if not tasks:
        raise ValueError("tasks is empty: write evaluation, all, or a list of Meta-world tasks")
    names = {task: str(task).replace("_", "-").removesuffix("-v3") for task in tasks}
    for task, name in names.items():
        if name not in known:
            raise ValueError(f"unknown Meta-world task {task!r}; there are {', '.join(known)}")
    return [f"metaworld/{names[task]}" for task in tasks]


def expert_for(name: str) -> Expert | None:
    """The scripted expert of an environment, None where there is none."""
    if name.startswith("metaworld/"):
        from metaworld.policies import ENV_POLICY_MAP  # imports MuJoCo: seconds, so on demand

        policy = ENV_POLICY_MAP[name.removeprefix("metaworld/") + "-v3"]()
        warnings.filterwarnings("ignore", "Constant.s. may be too high", module="metaworld")
        return lambda td: policy.get_action(cast(torch.Tensor, td["state"]).double().numpy())
    if name in ("toy", "toy/shifted"):
        return lambda td: cast(torch.Tensor, toy_expert(td.clone())["action"]).numpy()
    return None


@cache
def cached_env(name: str, **options: Any) -> EnvBase:
    """One environment of a kind a process: making one takes half a second."""
    return build_env(make_env, name, seed=0, num_workers=1, **options)


def collect_episode(number: int, *, names: list[str], cfg: CollectVideosConfig) -> Episode:
    """Rolls out episode ``number``. A pure function of its arguments."""
    rng = np.random.default_rng([cfg.seed, number])
    index = rng.integers(len(names)) if cfg.random_tasks else number % len(names)
    name = names[int(index)]
    options = {key: getattr(cfg, key) for key in ENV_SETTINGS}
    env = cached_env(name, **options)
    env.set_seed(int(rng.integers(2**31)))
    expert = expert_for(name)
    if rng.random() < cfg.random_fraction:
        expert = None
    size, choice = env.action_spec.shape[-1], isinstance(env.action_spec, OneHot)
    step = env.reset()
    frames, actions = [step["pixels"].numpy().copy()], [np.zeros(size, np.float32)]
    success, left = False, None
    for _ in range(cfg.max_steps):
        if expert is None:
            action = np.eye(size)[rng.integers(size)] if choice else rng.uniform(-1, 1, size)
        else:
            action = expert(step) + cfg.noise * rng.standard_normal(size)
        action = np.clip(action, -1, 1).astype(np.float32)
        step = env.step(step.set("action", torch.from_numpy(action)))["next"]
        frames.append(step["pixels"].numpy().copy())
        actions.append(action)
        if bool(step["success"]) and not success:
            success, left = True, cfg.after_success
        if bool(step["done"]) or left == 0:
            break
        left = None if left is None else left - 1
    label = name.removeprefix("metaworld/")
    return Episode(np.stack(frames), np.stack(actions), label, success, expert is not None)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    end_with_parent()
    torch.set_num_threads(1)


@contextmanager
def episode_stream(
    numbers: range, collect: Callable[[int], Episode], workers: int
) -> Iterator[Iterator[Episode]]:
    """The episodes in order, rolled out by ``workers`` processes.

    Raises:
        RuntimeError: a process has died.
    """
    if workers == 1 or len(numbers) < 2:
        yield map(collect, numbers)
        return
    context = multiprocessing.get_context("spawn")
    workers, others = min(workers, len(numbers)), set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield map_ahead(pool, collect, numbers, 2 * workers)
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that rolls out episodes has died (killed, out of memory, or a crash of the "
            "simulation): the same command goes on where it stopped"
        ) from None
    except BaseException:  # the episodes that they are in are not waited for
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def collect(cfg: CollectVideosConfig) -> ClipStore:
    """Brings the store to ``episodes`` episodes and returns it.

    Raises:
        ValueError, OSError, RuntimeError: unknown tasks, no space, no renderer: before any work.
        RuntimeError: see `episode_stream`; finished episodes are safe.
    """
    names = env_names(cfg.env, cfg.tasks)
    not_settings = ("data", "episodes", "workers")
    info = {k: v for k, v in asdict(cfg).items() if k not in not_settings} | {"envs": names}
    size = cfg.pixels
    with ClipWriter(
        cfg.data, source="collect_videos", height=size, width=size, decoder="simulator", info=info
    ) as writer:
        numbers = range(writer.num_clips, cfg.episodes)
        check_space(cfg.data, len(numbers) * (cfg.max_steps + 1) * 3 * size * size)
        job = partial(collect_episode, names=names, cfg=cfg)
        bar = Progress(cfg.episodes, initial=numbers.start, name="collect", unit="episodes")
        with episode_stream(numbers, job, cfg.workers) as episodes:
            for number, episode in zip(numbers, episodes, strict=True):
                writer.add(
                    episode.frames,
                    episode.actions,
                    name=f"{number:06d}-{episode.label.replace('/', '-')}",
                    label=episode.label,
                    info={"success": episode.success, "expert": episode.expert},
                )
                bar.update(frames=len(episode.frames))
        bar.close()
    return ClipStore(cfg.data)


def draw_sheet(store: ClipStore) -> Path:
    """Writes ``contact_sheet.png`` into the store: a row of frames for some of the episodes."""
    count = min(SHEET_EPISODES, len(store))
    episodes = np.linspace(0, len(store) - 1, count).round().astype(int)
    pictures, labels = [], []
    for episode in episodes:
        frames = store.read(int(episode))
        for t in np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int):
            pictures.append(torch.from_numpy(frames[t].copy()))
            labels.append(f"{store.names[episode][:6]} t={t}")
    tasks = ", ".join(sorted({str(label) for label in store.labels}))
    caption = f"{len(store)} episodes: {tasks if len(tasks) < 90 else 'many tasks'}"
    sheet = contact_sheet(pictures, labels=labels, columns=SHEET_FRAMES, caption=caption, scale=2)
    return write_picture(store.path / "contact_sheet.png", sheet)


def summary(store: ClipStore) -> str:
    """Success rate of the experts' episodes, in all and by task."""
    expert = [
        (str(label), info["success"])
        for label, info in zip(store.labels, store.infos, strict=True)
        if info and info["expert"]
    ]
    lines = [f"{len(store)} episodes, {store.num_frames} frames, {store.num_bytes / 2**20:.0f} MiB"]
    if expert:
        wins, total = sum(s for _, s in expert), len(expert)
        low, high = wilson_interval(wins, total)
        lines.append(f"expert success {wins}/{total} = {wins / total:.2f} [{low:.2f}, {high:.2f}]")
        counts, successes = Counter(t for t, _ in expert), Counter(t for t, s in expert if s)
        if len(counts) > 1:
            lines += [f"  {task:<28} {successes[task]}/{n}" for task, n in sorted(counts.items())]
    return "\n".join(lines)


def main(cfg: CollectVideosConfig) -> None:
    """Collect, then say what there is."""
    store = collect(cfg)
    print(summary(store))
    print(f"clip store: {store.path}, contact sheet: {draw_sheet(store)}")
