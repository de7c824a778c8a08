"""The examples run, small."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from tensordict import TensorDict

from tests.test_data_lerobot import make_dataset
from tests.toy_runs import rows

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "depth": 4,
    "deter": 16,
    "hidden": 16,
    "stoch": 4,
    "classes": 4,
    "head_units": 16,
    "latent_action_hidden": 16,
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    for example in EXAMPLES.iterdir():
        assert example.stem.startswith("_") or f"test_{example.stem}" in globals(), example.name


def test_torchrl_dreamerv3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("torchrl_dreamerv3")
    real, descend = example.Networks, example.descend
    networks: list[torch.nn.Module] = []
    still: list[set[int]] = []  # of each update, the parameters that it did not move

    def make(**sizes: int) -> torch.nn.Module:
        networks.append(real(**sizes))
        return networks[-1]

    def recorded(optimizer: torch.optim.Optimizer, losses: TensorDict) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        loss = descend(optimizer, losses)
        pairs = zip(before, parameters, strict=True)
        still.append({id(p) for old, p in pairs if torch.equal(old, p)})
        return loss

    monkeypatch.setattr(example, "Networks", make)
    monkeypatch.setattr(example, "descend", recorded)
    aligned: list[torch.nn.Module] = []
    align = example.Alignment.__call__

    def noted(alignment: Any, batch: TensorDict) -> dict[str, torch.Tensor]:
        aligned.append(alignment.inverse_model)
        return align(alignment, batch)

    monkeypatch.setattr(example.Alignment, "__call__", noted)
    small = {"videos": 4, "updates": 2, "steps": 65, "prefill": 50, "every": 5, "units": 32}
    small |= {"warm_up": 2, "align": 2, "episodes": 1}
    losses, returns = example.main(tmp_path, batch=(2, 6), **small)
    assert len(losses) == 2 and len(still) == 2 + 2 + 3 and len(aligned) == 2
    table = [(int(row["step"]), float(row["return"])) for row in rows(tmp_path, "returns.csv")]
    assert table == [(50, round(returns[0], 2)), (65, round(returns[1], 2))]
    assert 0 < min(returns) and max(returns) < 25
    # Video says nothing of rewards; the prior's head waits while the KL is below the free nats.
    (model,) = networks
    head = {id(p) for p in model.prior.rnn_to_prior_projector.parameters()}
    assert still[0] & still[1] <= head | {id(p) for p in model.reward.parameters()}
    assert set.intersection(*still[2:]) <= head


def test_own_encoder(tmp_path: Path) -> None:
    losses = load("own_encoder").main(tmp_path, videos=4, updates=6, **SMALL)
    assert losses[-1] < losses[0]


def test_own_environment(tmp_path: Path) -> None:
    steps = {"env_steps": 160, "prefill": 60, "train_every": 40, "batch_size": 2}
    steps |= {"batch_length": 6, "pretrain_updates": 1, "horizon": 3, "eval_episodes": 1}
    load("own_environment").main(tmp_path, model=SMALL, threads=1, **steps)
    returns = [row["train/return"] for row in rows(tmp_path / "run") if row["train/return"]]
    assert len(returns) == 3 and all(0 < float(x) < 50 for x in returns)


def test_own_latent_action(tmp_path: Path) -> None:
    small = {"updates": 3, "batch_size": 2, "clip_len": 6, "log_every": 1, "threads": 1}
    load("own_latent_action").main(tmp_path, videos=4, model=SMALL, **small)
    table = rows(tmp_path / "run")
    assert all(float(row["loss_push"]) > 0 for row in table if row["loss_push"])
    assert any(1 <= float(row["codes_used"]) <= 16 for row in table if row["codes_used"])


def test_lerobot_video(tmp_path: Path) -> None:
    source = make_dataset(tmp_path / "set", cameras=("observation.images.top", "wrist"))
    small = {"updates": 2, "batch_size": 2, "clip_len": 4, "context": 2, "log_every": 1}
    small |= {"labels": 0.5, "heldout": 0.3, "threads": 1, "model": SMALL}
    load("lerobot_video").main(source, "top", tmp_path, **small)
    table = rows(tmp_path / "run")
    assert any(float(row["loss_action_label"]) > 0 for row in table if row["loss_action_label"])


@pytest.mark.parametrize(("model", "updates"), [(None, 2), ("models/toy_prelar_plus", 0)])
def test_latent_actions(
    model: str | None, updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((EXAMPLES / "latent_actions.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    small = f"FOLDER, SIZES = {str(tmp_path)!r}, {SMALL}\nVIDEOS, UPDATES, BATCH = 60, 2, 5\n"
    small += f"MODEL = {model and str(EXAMPLES.parent / model)!r}\n"
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    shown: list[plt.Figure] = []
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            source += "\n" + small
        exec(compile(source, cell["id"], "exec"), names)  # noqa: S102
    plt.close("all")
    assert len(shown) == 4 and len(names["frames"]) == names["LENGTH"]
    assert names["update"].count == updates and names["moved"].shape[:2] == (5, names["LENGTH"])
