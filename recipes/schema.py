"""The configuration of each recipe: names, types, bounds and defaults.

Hydra composes it and checks its types; the dataclass checks its bounds when it is made. Published
settings are the defaults. ``model`` and ``loss`` override single settings of the method's preset
(:class:`prelar_trl.config.ModelSettings`, :class:`prelar_trl.config.LossSettings`); null keeps the
preset's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from prelar_trl.bounds import (
    LARGEST,
    Finite,
    Fraction,
    MediumInt,
    NonNegative,
    NonNegativeInt,
    NonNegativeSmallInt,
    PictureSize,
    Positive,
    PositiveInt,
    Seed,
    SmallInt,
    above,
    at_least,
    one_of,
)
from prelar_trl.config import Phase, model_settings
from prelar_trl.recipes.base_config import Config, free, overrides
from prelar_trl.recipes.values import (
    Collector,
    Compile,
    Device,
    Export,
    Gradient,
    Kind,
    Labels,
    Lists,
    Loggers,
    Method,
    Names,
    OwnOrStores,
    Parts,
    Pixels,
    Place,
    Places,
    Precision,
    Quality,
    Resize,
    Resume,
    Scheduled,
    ScheduledFraction,
    Size,
    Stores,
    Texts,
    as_names,
)
from prelar_trl.schedules import Schedule
from prelar_trl.utils import check_integers


@dataclass
class RunConfig(Config):
    """What every training run has."""

    phase: ClassVar[Phase]

    method: Method = "prelar"
    size: Size = "full"
    run: Place = MISSING  # run folder
    resume: Resume = False  # continue the run in that folder; auto: start it, or continue it
    seed: Seed = 0
    device: Device = "auto"  # auto, cpu, cuda, cuda:1
    precision: Precision = "32"
    compile: Compile = "auto"  # auto: a CUDA graph on CUDA; on: torch.compile
    threads: SmallInt | None = None  # CPU threads; null: torch's choice
    logger: Loggers = "csv"  # csv, tensorboard, wandb, or a list
    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    pixels: PictureSize = 64  # height and width of the pictures
    lr: Fraction = 3e-4
    clip: Positive = 100.0  # largest gradient norm
    max_skipped: PositiveInt = 10  # updates in a row that are not finite before the run stops
    keep: PositiveInt = 2  # newest checkpoints that are kept
    keep_every: PositiveInt | None = None  # updates or steps; the first checkpoint after each stays

    def __post_init__(self) -> None:
        super().__post_init__()
        model_settings(self.method, self.phase, self.size, overrides(self.model))


@dataclass
class PretrainConfig(RunConfig):
    """``pretrain.py``: a world model on action-free video."""

    phase = "pretrain"

    data: Stores = MISSING  # clip store folder, a list of them, or a mapping folder: weight
    updates: PositiveInt = 600_000
    batch_size: MediumInt = 16
    clip_len: MediumInt = 25
    heldout: Fraction = 0.1  # share of clips kept for the predictions; 0: predict training clips
    prefetch: NonNegativeSmallInt = 2  # batches prepared ahead
    context: MediumInt = 5  # frames seen before the open-loop prediction
    labels: NonNegative = 0.0  # share (below 1) or number of clips whose true actions are told
    # Times the videos' motion, for model.latent_action_shift; null: the method's; 0: not measured
    shift_by_motion: NonNegative | None = None
    usage_every: PositiveInt = 1_000  # updates between two looks at whether latent actions are used
    log_every: PositiveInt = 100
    video_every: PositiveInt = 5_000
    checkpoint_every: PositiveInt = 1_000


@dataclass
class FinetuneConfig(RunConfig):
    """``finetune.py``: world model, actor and critic on an environment."""

    phase = "finetune"

    env: str = MISSING  # metaworld/<task>, gym/<id>, toy, ..., or <module>:<callable>
    # Run folder of pretrain.py, folder of export.py, or hf://owner/name; null: from scratch.
    pretrained: Place | None = None
    trust_code: bool = False  # may run modules that this folder names
    env_steps: PositiveInt = 256_000
    prefill: NonNegativeInt = 5_000  # environment steps of random actions
    pretrain_updates: NonNegativeInt = 100  # before the first policy step
    load: Parts = None  # parts taken from it: encoder,rssm; null: all that it has
    frozen_updates: NonNegativeInt | None = 100  # pre-trained parts wait; null: one optimizer
    pretrained_lr: Fraction | None = None  # of pre-trained encoder and RSSM; null: lr
    align_updates: NonNegativeInt | None = None  # of the action encoder; null: the method's
    align_lr: Fraction = 1e-3
    rehearse: Fraction = 0.0  # share of each model batch that is pre-training video
    behavior_after: NonNegativeInt = 0  # model updates before actor and critic learn too
    train_every: Positive = 5  # environment steps an update; below 1: several updates a step
    batch_size: MediumInt = 50
    batch_length: Annotated[MediumInt, at_least(2)] = 50
    min_length: PositiveInt | None = None  # shortest window; null: batch_length
    capacity: PositiveInt = 1_000_000  # frames of the replay
    prefetch: NonNegativeSmallInt | None = None  # batches drawn ahead; null: 2 on a GPU, else 0
    action_repeat: PositiveInt = 1
    max_steps: PositiveInt | None = None  # an episode's; null: the environment's own
    camera: str | None = None  # null: corner in Meta-world, else the env's first camera
    cameras: Names = None  # instead: several pictures, [corner,gripperPOV]
    vectors: Names = None  # numbers that are seen too, by name or pattern: [proprio,joint*]
    render_quality: Quality = "fast"
    num_workers: SmallInt = 1
    collector: Collector = "sync"  # async: a process of its own acts while the updates are made
    worker_timeout: Positive = 120.0  # seconds without an answer: the worker hangs, is replaced
    worker_failures: PositiveInt = 5  # of one worker in a row: the run saves and stops
    horizon: Annotated[MediumInt, at_least(2)] = 15
    lmbda: Fraction = 0.95
    actor_lr: Fraction = 8e-5
    critic_lr: Fraction = 8e-5
    entropy_scale: Scheduled = 1e-4  # also linear(start,end,updates)
    actor_gradient: Gradient = "dynamics"
    actor_gradient_mix: ScheduledFraction = 0.1  # share of dynamics in both; also a schedule
    reward_norm_momentum: Fraction = 1.0  # of the imagined rewards' magnitude; 1: not normalized
    expl_noise: NonNegative = 0.0  # on the policy's actions while collecting
    eval_noise: NonNegative = 0.0
    eval_state_mean: bool = False  # evaluate with the latents' mode
    imag_batch: MediumInt | None = None
    slow_every: PositiveInt = 100
    slow_target_fraction: Annotated[Fraction, above(0)] = 1.0  # below 1: soft target updates
    eval_every: PositiveInt = 10_000
    eval_from: PositiveInt | None = None  # first evaluation; null: first multiple past the prefill
    eval_episodes: NonNegativeInt = 10  # 0: no evaluation
    log_every: PositiveInt = 1_000
    checkpoint_every: PositiveInt = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cameras", "vectors", "load"):
            setattr(self, name, as_names(getattr(self, name)))
        for name in ("entropy_scale", "actor_gradient_mix"):  # numbers come as text
            schedule = Schedule.parse(getattr(self, name))
            if schedule.is_constant:
                setattr(self, name, schedule.start)

    @property
    def first_evaluation(self) -> int:
        """The environment step of the first evaluation: after the random actions."""
        if self.eval_from is not None:
            return self.eval_from
        return (self.prefill // self.eval_every + 1) * self.eval_every


@dataclass
class EvaluateConfig(Config):
    """``evaluate.py``: episodes with a fine-tuned agent."""

    run: Place = MISSING
    episodes: PositiveInt = 10
    seed: Seed = 1_000
    device: Device = "auto"
    env: str | None = None  # null: the run's own
    num_workers: SmallInt = 1
    render_quality: Quality | None = None
    video_episodes: NonNegativeInt = 3
    checkpoint: str = "last"  # or best, or step_<number>
    trust_code: bool = False  # may run modules that the run folder names


@dataclass
class ProbeConfig(Config):
    """``probe.py``: what a pre-training run has learned."""

    run: Place = MISSING  # run folder of pretrain.py
    data: OwnOrStores = None  # clip store, as in pretrain.py; null: the run's own
    clips: MediumInt = 128  # windows of held-out clips, and as many of training clips to fit on
    batch_size: MediumInt = 16
    clip_len: MediumInt | None = None  # null: the run's own, as in context and heldout
    context: MediumInt | None = None
    heldout: Fraction | None = None
    transfers: NonNegativeInt = 2  # pictures of transferred latent actions
    seed: Seed = 0
    device: Device = "auto"
    threads: SmallInt | None = None
    trust_code: bool = False  # may run modules that the run folder names


@dataclass
class CollectVideosConfig(Config):
    """``collect_videos.py``: episodes of scripted experts into a clip store."""

    data: Place = MISSING  # clip store folder; if it exists, collecting continues
    episodes: PositiveInt = 100  # how many the store holds in the end
    env: str = "metaworld"  # the tasks below, or one env: toy/shifted, <module>:<callable>, ...
    tasks: Texts = "evaluation"  # the six of the papers, all, or a list of Meta-world tasks
    random_tasks: bool = False  # draw the task of each episode, instead of one after the other
    noise: NonNegative = 0.3  # standard deviation of the Gaussian noise on the expert's actions
    random_fraction: Fraction = 0.0  # share of episodes with uniformly random actions instead
    action_repeat: PositiveInt = 1  # of fine-tuning: else its frames lie further apart
    max_steps: PositiveInt = 150  # per episode, counted after action_repeat
    after_success: NonNegativeInt | None = 20  # steps after the first success; null: all
    camera: str | None = None  # null: corner in Meta-world, else the env's first camera
    render_quality: Quality = "fast"  # fast or full
    pixels: Pixels = 64
    workers: SmallInt = 1  # processes
    seed: Seed = 0


@dataclass
class PrepareVideosConfig(Config):
    """``prepare_videos.py``: videos of any kind into a clip store."""

    source: Place = MISSING  # the folder to read
    data: Place = MISSING  # clip store folder; run again to continue an interrupted one
    kind: Kind = "auto"  # videos: also folders of pictures
    pixels: Pixels = 64  # height and width of the stored frames
    resize: Resize = "squeeze"  # official, ignores the aspect ratio; or crop: the middle square
    stride: PositiveInt = 1  # keep every n-th frame
    max_frames: PositiveInt | None = None  # cut clips off after that many kept frames
    min_frames: PositiveInt = 2  # skip shorter clips
    white: Positive | None = None  # in pictures of more than 8 bits; null: 65535 (integers), 1
    flow: bool = False  # also store optical flow (needs opencv-python-headless)
    labels: Labels = None  # something, frames: only these, by number or template
    lists: Lists = None  # frames: official text lists, {train: train.txt, heldout: validation.txt}
    actions: bool = False  # episodes, lerobot, torchrl: also keep the true actions, for probes
    camera: str | None = None  # lerobot, torchrl: which picture; null: the only one
    export: Place | None = None  # afterwards write the store into this folder as well
    export_as: Export = "npz"  # npz (DreamerV2 episodes) or jpeg (official folders and lists)
    workers: NonNegativeSmallInt | None = None  # decoding processes; null or 0: one a core
    shard_mib: PositiveInt = 256  # size of one file of the store


@dataclass
class SweepConfig(Config):
    """``sweep.py``: methods x tasks x seeds, each pre-training once for all that need it.

    An ``experiment`` is a whole sweep; its ``variants`` and ``environments`` are tables, of which
    ``methods`` and ``tasks`` take some.
    """

    name: str = "sweep"  # its folder below root and results
    methods: list[str] | None = None  # null: all of variants
    tasks: list[str] | None = None  # null: all of environments
    seeds: PositiveInt = 1  # 0, 1, ... of each
    pretrain_seeds: PositiveInt | None = None  # pre-training runs of a method; null: one a seed
    # name: label, color, line, pretrain (settings, or the variant whose run it shares), finetune.
    variants: dict[str, Any] = free()  # empty: the presets, by their name
    environments: dict[str, Any] = free()  # name: settings of finetune.py
    videos: dict[str, Any] = free()  # collect_videos.py; or pretrain.data
    pretrain: dict[str, Any] = free()  # settings of pretrain.py, of all
    finetune: dict[str, Any] = free()
    from_scratch: str | None = None  # folder of runs without pre-training, shared by sweeps
    score: Annotated[str, one_of(("return", "success"))] = "success"  # compared in the report
    threshold: Finite = 0.8  # of the score: learned
    runtime: dict[str, Any] = free()  # device, threads, ... of all programs
    only: str = ""  # runs whose path this regular expression matches
    jobs: SmallInt = 2  # programs at a time
    launcher: Annotated[str, one_of(("local", "slurm", "ray"))] = "local"
    slurm: dict[str, Any] = free()  # of submitit: timeout_min, mem_gb, ...
    ray: dict[str, Any] = free()  # address of a cluster; of each program num_cpus, num_gpus, ...
    root: Place = "runs/sweep"  # runs, logs and states; also the code that runs
    results: Place = "results/curves"  # of finished runs: curves, tables, pictures
    copy_code: bool | None = None  # run a clean copy of the commit; null: in a git checkout
    update_code: bool = False  # take the present commit for unfinished runs
    status: bool = False  # show the state of all, run nothing
    report: bool = False  # only make tables and pictures anew
    dry_run: bool = False  # only show the runs, GPU hours and disk that are left
    update_times: Place | None = None  # dry_run: gpu.json of make gpu, measured on your GPU
    tflops: Positive = 10.0  # dry_run: declared speed of the GPU where nothing is measured
    env_step_s: NonNegative = 0.01  # dry_run: declared, an environment step with rendering


@dataclass
class PlotConfig(Config):
    """``plot.py``: a report from run folders, or a comparison of groups of them."""

    runs: Places = MISSING  # run folders, with compare also folders in which such lie; or a list
    out: Place = "report.html"
    title: str | None = None  # null: Training report, or Learning curves
    # A config key, e.g. method or model.latent_action: its values are compared, with statistics.
    compare: str | None = None  # null: a report of each run
    # compare: a CSV of others with method, task, seed, env_step, scores
    reference: Place | None = None
    reference_name: str = "reference"  # goes after their methods
    at: list[int] | None = None  # compare: steps of the table; null: 105k, 205k, 245k or the last
    baseline: str | None = None  # compare: the group to be better than; null: dreamerv2, or first

    def __post_init__(self) -> None:
        super().__post_init__()
        for step in self.at or ():
            check_integers(0, LARGEST, at=step)


@dataclass
class ExportConfig(Config):
    """``export.py``: a run's model as a folder to hand on."""

    run: Place = MISSING
    out: Place = MISSING  # the new folder
    push: str | None = None  # hub id, owner/name: put it there as well
    private: bool = False  # there
    license: str = "mit"  # of the weights, as the hub names it
    videos: str | None = None  # what it was trained on, for the card; null: the stores' names
    trust_code: bool = False  # the run's latent actions may be a module's


@dataclass
class ImportOfficialConfig(Config):
    """``import_official.py``: the authors' checkpoint into a run folder, or the reverse."""

    run: Place = MISSING  # the new run folder; with export the run to read
    official: Place | None = None  # folder of variables.pt
    export: Place | None = None  # instead: write the run's weights into this folder
    method: Method = "prelar"
    # pretrain, for finetune.py pretrained=; finetune, for evaluate.py
    phase: Annotated[str, one_of(get_args(Phase))] = "pretrain"
    size: Size = "full"
    model: dict[str, Any] = field(default_factory=dict)
    env: str = "metaworld/drawer-open"  # finetune: where the agent was trained
    trust_code: bool = False  # export: may run modules that the run folder names


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
        "sweep": SweepConfig,
        "plot": PlotConfig,
        "export": ExportConfig,
        "import_official": ImportOfficialConfig,
    }.items():
        store.store(name=f"{recipe}_schema", node=schema())
