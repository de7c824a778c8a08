"""What a sweep will take, before anything is run: GPU hours and disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tensordict import TensorDict, TensorDictBase
from torch.utils.flop_counter import FlopCounterMode

from prelar_trl.models import make_agent, make_world_model, make_world_model_loss
from prelar_trl.recipes.command_line import as_override
from prelar_trl.recipes.entry import CONFIGS, settings
from prelar_trl.recipes.pretrain import make_loss
from prelar_trl.recipes.resume import settle_preset
from prelar_trl.recipes.schema import FinetuneConfig, PretrainConfig, SweepConfig
from prelar_trl.sweep import Job
from prelar_trl.types import Inputs
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate, frozen

ACTION_DIM = 4  # Meta-world's
EPISODE = 500  # steps of an environment's own, where nothing else is set
COPIES = 3  # of the weights in a checkpoint: Adam has two moments
GIBIBYTE = 2**30


class Update(NamedTuple):
    """One update: its arithmetic, and the bytes of the weights that it changes."""

    flop: float
    state_bytes: int


@dataclass
class Estimate:
    """What one variant takes: runs, hours of a GPU (of an environment in ``env_hours``), bytes."""

    pretrainings: int = 0
    pretrain_hours: float = 0.0
    runs: int = 0
    updates: int = 0  # of all its runs
    update_hours: float = 0.0
    env_hours: float = 0.0
    kept_bytes: int = 0
    replay_bytes: int = 0  # of one run, while it lasts

    @property
    def hours(self) -> float:
        return self.pretrain_hours + self.update_hours + self.env_hours


def resolve(job: Job) -> Any:
    """The whole configuration of a job, as its recipe will see it.

    Raises:
        HydraException, ValueError: a setting that the recipe does not take.
    """
    given = [f"{name}={as_override(value)}" for name, value in job.settings.items()]
    place = "data" if job.recipe == "collect_videos" else "run"
    ready = GlobalHydra.instance().is_initialized()  # started as a program
    folder = str(CONFIGS.resolve())
    with nullcontext() if ready else initialize_config_dir(folder, version_base="1.3"):
        return settings(compose(job.recipe, [*given, f"{place}=here"]))


def length_of(cfg: PretrainConfig | FinetuneConfig) -> int:
    """Steps of a training window."""
    return cfg.clip_len if isinstance(cfg, PretrainConfig) else cfg.batch_length


def update_of(cfg: PretrainConfig | FinetuneConfig) -> Update:
    """The cost of one update: counted on the meta device, which has shapes and computes nothing.

    Of the operations those forward and backward, without the optimizer's and those of ``vectors``.
    """
    cfg = settle_preset(replace(cfg, resume=False))
    inputs = Inputs(cfg.pixels, views_of(cfg))
    options: dict[str, Any] = {"size": cfg.size, "inputs": inputs, **cfg.model}
    behavior_update = None
    with torch.device("meta"):
        if isinstance(cfg, PretrainConfig):
            module = world_model = make_world_model(cfg.method, cfg.phase, action_dim=0, **options)
            loss = make_loss(cfg, world_model, ACTION_DIM if cfg.labels else None)
        else:
            module = agent = make_agent(cfg.method, action_dim=ACTION_DIM, **options)
            world_model, bonus = agent.world_model, agent.video_bonus
            behavior_update = BehaviorUpdate(agent, horizon=cfg.horizon, imag_batch=cfg.imag_batch)
            loss = make_world_model_loss(
                cfg.method, cfg.phase, world_model, video_bonus=bonus, **cfg.loss
            )
        update = WorldModelUpdate(loss)
        batch = make_batch(cfg.batch_size, length_of(cfg), inputs)
        with FlopCounterMode(display=False) as counter:
            state = update.forward_backward(batch, None)["state"]
            if behavior_update is not None:
                assert isinstance(state, TensorDictBase)
                starts = world_model.flatten_start_states(
                    state.update(batch.select("terminated", "action", "is_first"))
                )
                with frozen(world_model):
                    behavior_update.forward_backward(starts[: behavior_update.imag_batch], True)
    state_bytes = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    return Update(float(counter.get_total_flops()), state_bytes)


def views_of(cfg: PretrainConfig | FinetuneConfig) -> int:
    """Pictures of a step."""
    cameras = cfg.cameras if isinstance(cfg, FinetuneConfig) else None
    return len(cameras) if cameras else 1


def make_batch(sequences: int, steps: int, inputs: Inputs) -> TensorDict:
    """A training batch ``[B, T]`` of zeros; on the meta device if that is the default."""
    shape = (sequences, steps)
    picture = (inputs.size, inputs.size)
    entries = {
        "pixels": torch.zeros(*shape, 3 * inputs.views, *picture, dtype=torch.uint8),
        "flow": torch.zeros(*shape, 3, *picture, dtype=torch.uint8),
        "action": torch.zeros(*shape, ACTION_DIM),
        "reward": torch.zeros(*shape, 1),
        "is_first": torch.zeros(*shape, 1, dtype=torch.bool),
        "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
        "labeled": torch.ones(*shape, 1, dtype=torch.bool),
    }
    return TensorDict(entries, batch_size=shape)


class Clock:
    """Seconds of an update: measured where a report has it, else declared.

    Args:
        cfg: ``update_times``, the report, of ``make gpu`` or ``benchmarks/train.py --json``;
            ``tflops``, a declared speed.

    Raises:
        ValueError: a file that is no such report.
    """

    def __init__(self, cfg: SweepConfig) -> None:
        self.tflops, self.rows, self.machine = cfg.tflops, [], ""
        self.measured, self.declared = 0, 0  # kinds of update
        if cfg.update_times is not None:
            try:
                report = json.loads(Path(cfg.update_times).read_text(encoding="utf-8"))
                self.rows, self.machine = read_report(report)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f"update_times={cfg.update_times} is no report of make gpu (gpu.json) or "
                    "benchmarks/train.py --json"
                ) from None

    def seconds(self, cfg: PretrainConfig | FinetuneConfig, flop: float) -> float:
        """Of an update of ``flop`` operations: compiled as the run is, if that was measured."""
        wanted = {"method": cfg.method, "phase": cfg.phase, "size": cfg.size}
        wanted |= {"batch": cfg.batch_size, "length": length_of(cfg), "precision": cfg.precision}
        rows = [row for row in self.rows if wanted.items() <= row.items()]
        rows.sort(key=lambda row: row.get("compile") != cfg.compile)
        if rows:
            self.measured += 1
            return (rows[0]["world_model_ms"] + rows[0]["behavior_ms"]) / 1e3
        self.declared += 1
        return flop / (self.tflops * 1e12)

    def label(self) -> str:
        """Where the hours come from."""
        parts = []
        if self.measured:
            parts.append(f"measured updates of {self.measured} runs' settings on {self.machine}")
        if self.declared:
            parts.append(
                f"DECLARED, not measured: counted operations at {self.tflops:g} TFLOP/s "
                f"(tflops=) for {self.declared} runs' settings; update_times=<gpu.json of make "
                "gpu> takes measured ones"
            )
        return "; ".join(parts)


def read_report(report: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The measured updates of a benchmark's report, and on which machine.

    Raises:
        AttributeError, KeyError, TypeError: it is none.
    """
    if "rows" in report:  # benchmarks/train.py
        return report["rows"], report["gpu"] or report["machine"]
    rows = [row for row in report.get("times", {}).get("results", []) if "world_model_ms" in row]
    about = report["device"]
    return rows, about.get("name", about["device"])


def estimate(jobs: Iterable[Job], cfg: SweepConfig) -> tuple[dict[str, Estimate], str]:
    """What jobs will take, by variant, and where the hours come from."""
    clock, known = Clock(cfg), {}
    estimates: dict[str, Estimate] = {}
    for job in jobs:
        if job.recipe == "collect_videos":
            continue
        name = job.run.get("variant") or job.name.rpartition("-")[0]
        own = estimates.setdefault(name, Estimate())
        apart = ("seed", "env", "pretrained", "data")
        key = json.dumps([job.recipe, {k: x for k, x in job.settings.items() if k not in apart}])
        if key not in known:
            resolved = resolve(job)
            flop, state_bytes = update_of(resolved)
            known[key] = resolved, clock.seconds(resolved, flop), state_bytes
        resolved, seconds, state_bytes = known[key]
        own.kept_bytes += checkpoints_of(resolved) * COPIES * state_bytes
        if job.recipe == "pretrain":
            own.pretrainings += 1
            own.pretrain_hours += resolved.updates * seconds / 3600
        else:
            updates, steps = work_of(resolved)
            own.runs += 1
            own.updates += updates
            own.update_hours += updates * seconds / 3600
            own.env_hours += steps * cfg.env_step_s / 3600
            frames = min(resolved.capacity, resolved.env_steps // resolved.action_repeat)
            picture_bytes = 3 * views_of(resolved) * resolved.pixels**2
            own.replay_bytes = max(own.replay_bytes, frames * picture_bytes)
    return estimates, clock.label()


def checkpoints_of(cfg: PretrainConfig | FinetuneConfig) -> int:
    """Checkpoints that a run leaves: the newest, those of ``keep_every``, and its best agent."""
    steps, best = (cfg.updates, 0) if isinstance(cfg, PretrainConfig) else (cfg.env_steps, 1)
    stay = steps // max(cfg.keep_every, cfg.checkpoint_every) if cfg.keep_every else 0
    return cfg.keep + stay + best


def work_of(cfg: FinetuneConfig) -> tuple[int, int]:
    """Updates of a run, and environment steps with those of its evaluations."""
    updates = cfg.pretrain_updates + int((cfg.env_steps - cfg.prefill) / cfg.train_every)
    evaluations = 1 + ceil(max(0, cfg.env_steps - cfg.first_evaluation) / cfg.eval_every)
    episode = cfg.max_steps * cfg.action_repeat if cfg.max_steps else EPISODE
    return updates, cfg.env_steps + evaluations * cfg.eval_episodes * episode


def estimate_table(estimates: Mapping[str, Estimate], label: str, cfg: SweepConfig) -> str:
    """The estimates as text, with their sums."""
    head = ("method", "pre-trainings", "hours", "runs", "updates", "hours", "env hours")
    rows: list[tuple[str, ...]] = [(*head, "sum", "kept GiB")]
    for name, x in estimates.items():
        rows.append(
            (
                name,
                str(x.pretrainings),
                f"{x.pretrain_hours:.1f}",
                str(x.runs),
                f"{x.updates:,}",
                f"{x.update_hours:.1f}",
                f"{x.env_hours:.1f}",
                f"{x.hours:.1f}",
                f"{x.kept_bytes / GIBIBYTE:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    values = list(estimates.values())
    hours, kept = sum(x.hours for x in values), sum(x.kept_bytes for x in values)
    largest = max((x.replay_bytes for x in values), default=0)
    at_once = kept + cfg.jobs * largest
    lines += [
        "",
        f"{sum(x.pretrainings for x in values)} pre-training and {sum(x.runs for x in values)} "
        f"fine-tuning runs, {hours:,.0f} GPU hours, {hours / cfg.jobs:,.0f} with {cfg.jobs} at a "
        "time",
        f"hours: {label}; {cfg.env_step_s * 1e3:g} ms an environment step (env_step_s=), declared",
        f"disk: {kept / GIBIBYTE:,.0f} GiB of checkpoints stay, {at_once / GIBIBYTE:,.0f} GiB at "
        "most with the replays of the runs at work; videos not counted",
    ]
    return "\n".join(lines)
