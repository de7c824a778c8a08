"""What do the losses on latent actions teach? Tiny models, videos of scripted experts, probes.

    python benchmarks/study.py                    everything, 25 minutes on two cores; continues
    python benchmarks/study.py --updates 5 --seeds 1 --runs runs/try --out runs/try/results

Pre-trains PreLAR with each consistency loss, with the action contrast in its place and without,
then probes each run on held-out clips. Finished runs are not repeated. Writes ``runs.csv`` (every
probe of every run), ``table.csv``, ``table.md`` and ``study.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.probe import probe
from prelar_trl.recipes.schema import PretrainConfig, ProbeConfig
from prelar_trl.record import plot_bars

PROBE_LEN = 16  # frames of a probed window: 5 seen, 11 imagined
CONTRAST = {"action_state_consistency": None, "action_contrast": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "soft": {"method": "prelar", "loss": {"consistency": "soft"}},
    "sign": {"method": "prelar", "loss": {"consistency": "sign"}},
    "soft_rank": {"method": "prelar", "loss": {"consistency": "soft_rank"}},
    "action_contrast": {"method": "prelar", "loss": {"weights": CONTRAST}},
    "no_cl": {"method": "prelar_no_cl", "loss": {}},
    "no_al_cl": {"method": "prelar_no_al_cl", "loss": {}},
}
# Title -> value of probe.json.
COLUMNS = {
    "PSNR, own actions (dB)": "openloop_psnr/own_actions_mean",
    "PSNR, other actions (dB)": "openloop_psnr/other_actions_mean",
    "PSNR, last frame (dB)": "openloop_psnr/last_frame_mean",
    "SSIM, own actions": "openloop_ssim/own_actions_mean",
    "R², latent action": "action_r2/latent_action",
    "R², random encoder": "action_r2/random_encoder",
    "R², frame difference": "action_r2/frame_difference",
    "rank corr., latent and state distance": "rank_correlation/latent_state",
    "rank corr., true and state distance": "rank_correlation/true_state",
    "rank corr., true and latent distance": "rank_correlation/true_latent",
    "own action explains best (chance 0.2)": "contrast/accuracy",
}
SHOWN = [name for name in COLUMNS if not name.startswith(("PSNR, last", "R², r", "R², f"))]


def main() -> None:
    args = parse_arguments()
    collect_videos(args)
    names = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        jobs = {pool.submit(run_one, *name, args): name for name in names}
        for count, job in enumerate(as_completed(jobs), 1):
            variant, seed = jobs[job]
            job.result()
            minutes = (time.monotonic() - started) / 60
            print(f"{count}/{len(jobs)} {variant} seed {seed}, {minutes:.1f} min", flush=True)
    write_results(args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=600, help="of pre-training, a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clip-len", type=int, default=10, help="in training; probes take 16")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clips", type=int, default=192, help="windows that are probed")
    parser.add_argument("--episodes", type=int, default=120, help="videos to collect")
    parser.add_argument("--data", type=Path, default=Path("videos/study"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("results/study"))
    return parser.parse_args()


def collect_videos(args: argparse.Namespace) -> None:
    """Videos of the evaluation tasks' experts; a finished store is left as it is."""
    command = [sys.executable, "-m", "prelar_trl.recipes.collect_videos"]
    options = [f"data={args.data}", f"episodes={args.episodes}", "max_steps=100"]
    subprocess.run([*command, *options], check=True)


def run_one(variant: str, seed: int, args: argparse.Namespace) -> None:
    """Pre-train and probe one variant, unless that is done; its output goes to ``<run>.log``."""
    run = args.runs / f"{variant}-{seed}"
    if (run / "probe.json").is_file():
        check_same(run, args)
        return
    resume = (run / "checkpoints" / "last.pt").is_file()
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    preset = VARIANTS[variant]
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_suffix(".log"), "a", encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            pretrain(
                PretrainConfig(
                    method=preset["method"],
                    loss=preset["loss"],
                    size="tiny",
                    data=str(args.data),
                    run=str(run),
                    resume=resume,
                    seed=seed,
                    updates=args.updates,
                    batch_size=args.batch_size,
                    clip_len=args.clip_len,
                    lr=args.lr,
                    log_every=50,
                    video_every=args.updates,
                    checkpoint_every=200,
                    prefetch=0,
                    device="cpu",
                    threads=1,
                )
            )
            clips = {"clips": args.clips, "clip_len": PROBE_LEN}
            probe(ProbeConfig(run=str(run), **clips, device="cpu", threads=1))


def check_same(run: Path, args: argparse.Namespace) -> None:
    done = json.loads((run / "probe.json").read_text(encoding="utf-8"))
    if (done["step"], done["clips"]) != (args.updates, args.clips):
        raise ValueError(
            f"{run} has {done['step']} updates and {done['clips']} probed clips, not "
            f"{args.updates} and {args.clips}: choose another --runs, or remove it"
        )


def write_results(args: argparse.Namespace) -> None:
    """Tables and picture, from the runs' own files."""
    args.out.mkdir(parents=True, exist_ok=True)
    values: dict[str, dict[str, list[float]]] = {}  # variant -> column -> one value a seed
    with open(args.out / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "probe", "name", "horizon", "value"])
        for variant in VARIANTS:
            columns = values.setdefault(variant, {name: [] for name in COLUMNS})
            for seed in range(args.seeds):
                run = args.runs / f"{variant}-{seed}"
                with open(run / "probe.csv", newline="", encoding="utf-8") as probes:
                    writer.writerows([variant, seed, *row] for row in list(csv.reader(probes))[1:])
                found = json.loads((run / "probe.json").read_text(encoding="utf-8"))["values"]
                for name, key in COLUMNS.items():
                    columns[name].append(found[key])
    with open(args.out / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "quantity", "mean", "deviation", "seeds"])
        for variant, columns in values.items():
            for name, x in columns.items():
                writer.writerow([variant, name, f"{mean(x):.4g}", f"{deviation(x):.2g}", len(x)])
    lines = [
        f"Tiny models, {args.updates} updates of {args.batch_size}x{args.clip_len} frames, videos "
        f"of {args.episodes} episodes of Meta-world's scripted experts; mean ± standard deviation "
        f"over {args.seeds} seeds, on held-out clips.",
        "",
        "| | " + " | ".join(VARIANTS) + " |",
        "|---|" + "---|" * len(VARIANTS),
    ]
    for name in COLUMNS:
        cells = [f"{mean(x[name]):.3g} ± {deviation(x[name]):.2g}" for x in values.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    panels = {name: {variant: x[name] for variant, x in values.items()} for name in SHOWN}
    plot_bars(panels, args.out / "study.png", columns=4)
    print("\n".join(lines))
    print(f"results: {args.out}")


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def deviation(values: list[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
