"""The configuration of each recipe: names, types and defaults. Hydra composes and checks them.

Published settings are the defaults. ``model`` and ``loss`` override single fields of the method's
preset (:class:`prelar_trl.presets.ModelSettings`, :class:`prelar_trl.presets.LossSettings`); null
keeps the preset's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from prelar_trl.presets import LossSettings, ModelSettings


def _overrides(name: str, settings: type) -> type:
    """A dataclass with the fields of ``settings``, all null. Hydra checks bools and numbers."""
    types = get_type_hints(settings)
    checked = {t: t | None for t in (bool, int, float)}
    return make_dataclass(
        name,
        [(f.name, checked.get(types[f.name], Any), field(default=None)) for f in fields(settings)],
    )


ModelOverrides = _overrides("ModelOverrides", ModelSettings)
LossOverrides = _overrides("LossOverrides", LossSettings)


@dataclass
class RunConfig:
    """What every training run has."""

    method: str = MISSING
    size: str = MISSING
    run: str = MISSING  # run folder
    resume: bool = False  # continue the run in that folder
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: str = "32"  # 32 or bf16
    compile: str = "auto"  # auto (on CUDA; eager where that fails or is slower), on, off
    threads: int | None = None  # CPU threads; null: torch's choice
    logger: Any = "csv"  # csv, tensorboard, wandb, or a list
    model: ModelOverrides = field(default_factory=ModelOverrides)
    loss: LossOverrides = field(default_factory=LossOverrides)
    lr: float = 3e-4
    clip: float = 100.0  # largest gradient norm


@dataclass
class PretrainConfig(RunConfig):
    """``pretrain.py``: a world model on action-free video."""

    data: Any = MISSING  # clip store folder, a list of them, or a mapping folder: weight
    updates: int = 600_000
    batch_size: int = 16
    clip_len: int = 25
    heldout: float = 0.1  # share of clips kept for the predictions; 0: predict training clips
    prefetch: int = 2  # batches prepared ahead
    context: int = 5  # frames seen before the open-loop prediction
    labels: float = 0.0  # of that share (below 1) or number of clips the true actions are told
    usage_every: int = 1_000  # updates between two looks at whether latent actions are used
    log_every: int = 100
    video_every: int = 5_000
    checkpoint_every: int = 1_000


@dataclass
class FinetuneConfig(RunConfig):
    """``finetune.py``: world model, actor and critic on an environment."""

    env: str = MISSING  # metaworld/<task>, gym/<id>, dm_control/<domain>/<task>, toy
    pretrained: str | None = None  # run folder of pretrain.py; null: from scratch
    env_steps: int = 256_000
    prefill: int = 5_000  # environment steps of random actions
    pretrain_updates: int = 100  # before the first policy step
    frozen_updates: int | None = 100  # pre-trained parts stand still; null: one optimizer
    align_updates: int | None = None  # of the action encoder, before all; null: the method's
    align_lr: float = 1e-3
    rehearse: float = 0.0  # share of each model batch that is pre-training video
    behavior_after: int = 0  # model updates before actor and critic learn too
    train_every: float = 5  # environment steps an update; below 1: several updates a step
    batch_size: int = 50
    batch_length: int = 50
    min_length: int | None = None  # shortest window; null: batch_length. Shorter episodes: whole
    capacity: int = 1_000_000  # frames of the replay
    action_repeat: int = 1
    max_steps: int | None = None  # an episode's; null: the environment's own
    camera: str | None = None
    render_quality: str = "fast"
    num_workers: int = 1
    horizon: int = 15
    lmbda: float = 0.95
    actor_lr: float = 8e-5
    critic_lr: float = 8e-5
    entropy_scale: float = 1e-4
    actor_gradient: str = "dynamics"
    imag_batch: int | None = None
    slow_every: int = 100
    eval_every: int = 10_000
    eval_episodes: int = 10  # 0: no evaluation
    log_every: int = 1_000
    checkpoint_every: int = 10_000


@dataclass
class EvaluateConfig:
    """``evaluate.py``: episodes with a fine-tuned agent."""

    run: str = MISSING
    episodes: int = 10
    seed: int = 1_000
    device: str = "auto"
    env: str | None = None  # null: the run's own
    num_workers: int = 1
    render_quality: str | None = None
    video_episodes: int = 3


@dataclass
class ProbeConfig:
    """``probe.py``: what a pre-training run has learned."""

    run: str = MISSING  # run folder of pretrain.py
    data: Any = None  # clip store, as in pretrain.py; null: the run's own
    clips: int = 128  # windows of held-out clips, and as many of training clips to fit on
    batch_size: int = 16
    clip_len: int | None = None  # null: the run's own, as in context and heldout
    context: int | None = None
    heldout: float | None = None
    transfers: int = 2  # pictures of transferred latent actions
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


@dataclass
class CollectVideosConfig:
    """``collect_videos.py``: episodes of scripted experts into a clip store."""

    data: str = MISSING  # clip store folder; if it exists, collecting continues
    episodes: int = 100  # how many the store holds in the end
    env: str = "metaworld"  # the tasks below, or one env: metaworld/<task>, toy/shifted, ...
    tasks: Any = "evaluation"  # the six of the papers, all, or a list of Meta-world tasks
    random_tasks: bool = False  # draw the task of each episode, instead of one after the other
    noise: float = 0.3  # standard deviation of the Gaussian noise on the expert's actions
    random_fraction: float = 0.0  # share of episodes with uniformly random actions instead
    max_steps: int = 150  # per episode
    after_success: int | None = 20  # an episode's steps after its first success; null: all
    camera: str | None = None  # null: corner in Meta-world, else the env's first camera
    render_quality: str = "fast"  # fast or full
    pixels: int = 64
    workers: int = 1  # processes
    seed: int = 0


@dataclass
class PrepareVideosConfig:
    """``prepare_videos.py``: videos of any kind into a clip store."""

    source: str = MISSING  # the folder to read
    data: str = MISSING  # clip store folder; run again to continue an interrupted one
    kind: str = "auto"  # auto, videos (also folders of pictures), something, frames, episodes
    pixels: int = 64  # height and width of the stored frames
    resize: str = "squeeze"  # official, ignores the aspect ratio; or crop: the middle square
    stride: int = 1  # keep every n-th frame
    max_frames: int | None = None  # cut clips off after that many kept frames
    min_frames: int = 2  # skip shorter clips
    white: float | None = None  # white in pictures of more than 8 bits; null: 65535 (integers), 1
    flow: bool = False  # also store optical flow (needs opencv-python-headless)
    labels: list[Any] | None = None  # something, frames: only these, by number or template
    lists: Any = None  # frames: official text lists, {train: train.txt, heldout: validation.txt}
    actions: bool = False  # episodes: also keep the true actions, for probes
    export: str | None = None  # afterwards write the store into this folder as well
    export_as: str = "npz"  # npz (DreamerV2 episodes) or jpeg (official folders and lists)
    workers: int | None = None  # decoding processes; null: one a core
    shard_mib: int = 256  # size of one file of the store


@dataclass
class PlotConfig:
    """``plot.py``: a report from run folders."""

    runs: Any = MISSING  # run folders, one or a list
    out: str = "report.html"
    title: str = "Training report"


@dataclass
class ImportOfficialConfig:
    """``import_official.py``: the authors' checkpoint into a run folder, or the reverse."""

    run: str = MISSING  # the new run folder; with export the run to read
    official: str | None = None  # folder of variables.pt
    export: str | None = None  # instead: write the run's weights into this folder
    method: str = "prelar"
    phase: str = "pretrain"  # pretrain, for finetune.py pretrained=; finetune, for evaluate.py
    size: str = "full"
    model: ModelOverrides = field(default_factory=ModelOverrides)
    env: str = "metaworld/drawer-open"  # finetune: where the agent was trained


def register() -> None:
    """Make the schemas known to Hydra, as ``<recipe>_schema``."""
    store = ConfigStore.instance()
    for recipe, schema in {
        "pretrain": PretrainConfig,
        "finetune": FinetuneConfig,
        "evaluate": EvaluateConfig,
        "probe": ProbeConfig,
        "collect_videos": CollectVideosConfig,
        "prepare_videos": PrepareVideosConfig,
        "plot": PlotConfig,
        "import_official": ImportOfficialConfig,
    }.items():
        store.store(name=f"{recipe}_schema", node=schema)
