"""Tables, goals and pictures of :mod:`benchmarks.study`, from the files of its runs alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prelar_trl.recipes.sweep import say
from prelar_trl.record import COLORS, plot_bars, write_csv

Values = Mapping[str, float]
Quantity = Callable[[Values], float]
TABLES = {"experts": "table.csv", "toy": "toy.csv"}  # other data sets: <name>.csv


class Goal(NamedTuple):
    """A mean that is to reach a number; without a variant, that of the best one."""

    text: str
    data: str
    variant: str | None
    quantity: str
    least: float


def probed(name: str) -> Quantity:
    """A value of ``probe.json``; NaN where there is none."""
    return lambda values: values.get(name, math.nan)


def better(name: str) -> Quantity:
    """R² of the linear map or of the MLP, whichever is better."""
    linear, mlp = probed(f"action_r2/{name}"), probed(f"action_r2_mlp/{name}")
    return lambda values: max(linear(values), mlp(values))


def minus(a: Quantity, b: Quantity) -> Quantity:
    return lambda values: a(values) - b(values)


def usage(values: Values) -> float:
    """How much more often than by chance the own action explains best: 0 chance, 1 perfect."""
    chance = probed("contrast/chance")(values)
    return (probed("contrast/accuracy")(values) - chance) / (1 - chance)


OWN, OTHER, LAST = (
    probed(f"openloop_psnr/{name}_mean") for name in ("own_actions", "other_actions", "last_frame")
)
MOVED, MOVED_OWN, NOT_MOVED = (
    probed(f"transfer_psnr/{name}") for name in ("transferred", "own", "own_played")
)
QUANTITIES: dict[str, Quantity] = {
    "PSNR, own actions (dB)": OWN,
    "PSNR, other actions (dB)": OTHER,
    "PSNR, last frame (dB)": LAST,
    "PSNR, own minus other actions (dB)": minus(OWN, OTHER),
    "PSNR, own actions minus last frame (dB)": minus(OWN, LAST),
    "SSIM, own actions": probed("openloop_ssim/own_actions_mean"),
    "SSIM, last frame": probed("openloop_ssim/last_frame_mean"),
    "R², latent action": probed("action_r2/latent_action"),
    "R², random encoder": probed("action_r2/random_encoder"),
    "R², frame difference": probed("action_r2/frame_difference"),
    "R², state": probed("action_r2/state"),
    "R², latent action and state": probed("action_r2/latent_action_and_state"),
    "R² (MLP), latent action": probed("action_r2_mlp/latent_action"),
    "R² (MLP), random encoder": probed("action_r2_mlp/random_encoder"),
    "R² (MLP), frame difference": probed("action_r2_mlp/frame_difference"),
    "R² (MLP), state": probed("action_r2_mlp/state"),
    "R² (MLP), latent action and state": probed("action_r2_mlp/latent_action_and_state"),
    "R² (better), latent action": better("latent_action"),
    "R² (better), random encoder": better("random_encoder"),
    "R² (better), frame difference": better("frame_difference"),
    "R² (better), latent action minus random encoder": minus(
        better("latent_action"), better("random_encoder")
    ),
    "rank corr., latent and state distance": probed("rank_correlation/latent_state"),
    "rank corr., true and state distance": probed("rank_correlation/true_state"),
    "rank corr., true and latent distance": probed("rank_correlation/true_latent"),
    "own action explains best (chance 0.2)": probed("contrast/accuracy"),
    "action usage (0 ignored, 1 perfect)": usage,
    "transfer, PSNR of transferred actions (dB)": MOVED,
    "transfer, PSNR of own actions (dB)": MOVED_OWN,
    "transfer, PSNR of own actions for the transferred (dB)": NOT_MOVED,
    "transfer, PSNR of transferred minus own (dB)": minus(MOVED, MOVED_OWN),
    "transfer, PSNR of transferred minus no transfer (dB)": minus(MOVED, NOT_MOVED),
    "transfer, PSNR of own minus no transfer (dB)": minus(MOVED_OWN, NOT_MOVED),
}
SHOWN = (  # in the picture and table.md, where there is a value
    "PSNR, own actions minus last frame (dB)",
    "PSNR, own minus other actions (dB)",
    "own action explains best (chance 0.2)",
    "R² (better), latent action",
    "R² (better), random encoder",
    # Not minus own actions: that is near 0 too where actions are ignored.
    "transfer, PSNR of transferred minus no transfer (dB)",
)
EXPLAINS, R2 = "own action explains best (chance 0.2)", "R² (better), latent action"
GOALS = (
    Goal("own action explains best, at least 0.6", "experts", "prelar_plus", EXPLAINS, 0.6),
    Goal(
        "exchanging actions costs at least 1 dB",
        "experts",
        "prelar_plus",
        "PSNR, own minus other actions (dB)",
        1.0,
    ),
    Goal(
        "R² without labels, at least 0.15 above the random encoder's",
        "experts",
        "prelar_plus",
        "R² (better), latent action minus random encoder",
        0.15,
    ),
    Goal("R² with 2% of labels, at least 0.7", "experts", "prelar_plus_labels", R2, 0.7),
    Goal(
        "better than repeating the last frame",
        "experts",
        None,
        "PSNR, own actions minus last frame (dB)",
        0.0,
    ),
    Goal("R² without labels, at least 0.8", "toy", "prelar_plus", R2, 0.8),
    Goal("own action explains best, at least 0.8", "toy", "prelar_plus", EXPLAINS, 0.8),
    Goal(
        "transferred actions at most 2 dB behind own",
        "toy",
        "prelar_plus",
        "transfer, PSNR of transferred minus own (dB)",
        -2.0,
    ),
    Goal(
        "better than repeating the last frame",
        "toy",
        None,
        "PSNR, own actions minus last frame (dB)",
        0.0,
    ),
)

OURS, OTHERS = COLORS[1], COLORS[0]

# variant -> quantity -> one value a seed, numbers only
Results = dict[str, dict[str, list[float]]]


def write_report(folder: Path, variants: Sequence[str]) -> None:
    """Make tables and pictures of the finished runs anew.

    Args:
        folder: of the results; the runs' files lie in ``runs/<data set>``.
        variants: their order; others come after them.
    """
    order = {variant: i for i, variant in enumerate(variants)}
    runs = [json.loads(path.read_text("utf-8")) for path in folder.glob("runs/*/*.json")]
    if not runs:
        say(f"nothing to report: no finished run in {folder}")
        return
    runs.sort(key=lambda run: (run["data"], order.get(run["variant"], len(order)), run["seed"]))
    rows = [{name: quantity(numbers(run)) for name, quantity in QUANTITIES.items()} for run in runs]
    results: dict[str, Results] = {}
    for run, row in zip(runs, rows, strict=True):
        of_variant = results.setdefault(run["data"], {}).setdefault(run["variant"], {})
        for name, value in row.items():
            of_variant.setdefault(name, []).extend([] if math.isnan(value) else [value])
    write_csv(
        folder / "runs.csv",
        ["data", "variant", "seed", *QUANTITIES],
        (
            [run["data"], run["variant"], run["seed"], *map(cell, row.values())]
            for run, row in zip(runs, rows, strict=True)
        ),
    )
    lines = goal_lines(results)
    for data, found in results.items():
        write_csv(
            folder / TABLES.get(data, f"{data}.csv"),
            ["variant", "quantity", "mean", "deviation", "seeds"],
            (
                [variant, name, f"{mean(x):.4g}", f"{deviation(x):.2g}", len(x)]
                for variant, quantities in found.items()
                for name, x in quantities.items()
                if x
            ),
        )
        lines += data_lines(data, found, [run for run in runs if run["data"] == data])
        shown = {name: {v: x[name] for v, x in found.items() if x[name]} for name in SHOWN}
        shown = {name: panel for name, panel in shown.items() if panel}
        colors = {v: OURS if v.startswith("prelar_plus") else OTHERS for v in found}
        difference = [y for x in found.values() for y in x["R² (better), frame difference"]]
        lines_at = {EXPLAINS: 0.2} | ({R2: mean(difference)} if difference else {})
        plot_bars(shown, folder / f"{data}.png", colors=colors, lines=lines_at)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    say(f"report: {folder}")


def goal_lines(results: Mapping[str, Results]) -> list[str]:
    """The goals as a Markdown table."""
    lines = ["| data | variant | goal | mean ± deviation (seeds) | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        found = {v: x[goal.quantity] for v, x in results.get(goal.data, {}).items()}
        found = {v: x for v, x in found.items() if x and goal.variant in (v, None)}
        best = max(found, key=lambda variant: mean(found[variant]), default=None)
        if best is None:
            shown, verdict = "", "not run"
        else:
            values = found[best]
            shown = f"{spread(values)} ({len(values)})"
            verdict = "met" if mean(values) >= goal.least else "missed"
            if abs(mean(values) - goal.least) < deviation(values):
                verdict += ", by less than the deviation"
        variant = goal.variant or f"the best: {best or ''}".rstrip(": ")
        lines.append(f"| {goal.data} | {variant} | {goal.text} | {shown} | {verdict} |")
    return lines


def data_lines(data: str, found: Results, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a data set's runs were, and their main quantities as a Markdown table."""
    columns = [name for name in SHOWN if any(x[name] for x in found.values())]
    settings = [run["inputs"]["needs"]["settings"] for run in runs]
    kinds = {f"{x['size']}, {x['updates']} updates of {frames(x)} frames" for x in settings}
    episodes = {run["inputs"]["needs"]["needs"]["settings"]["episodes"] for run in runs}
    seeds = sorted({len(next(iter(x.values()))) for x in found.values()})
    lines = [
        "",
        f"**{data}**: size {' and '.join(sorted(kinds))}, videos of "
        f"{' and '.join(map(str, sorted(episodes)))} episodes; mean ± standard deviation over "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds, on held-out clips.",
        "",
        "| variant | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for variant, x in found.items():
        cells = [spread(x[name]) if x[name] else "" for name in columns]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def frames(settings: Mapping[str, Any]) -> str:
    return f"{settings['batch_size']}x{settings['clip_len']}"


def numbers(run: Mapping[str, Any]) -> dict[str, float]:
    """A run's values that are numbers."""
    return {name: value for name, value in run["values"].items() if value is not None}


def cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3g} ± {deviation(values):.2g}"


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
