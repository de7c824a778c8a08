"""What the authors' options offer but their code fails on: each trains here, in both phases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from prelar_trl import config
from prelar_trl.config import METHODS, Method
from prelar_trl.models import Agent, copy_pretrained, pretrained_modules
from prelar_trl.modules import RSSMWorldModel, context
from prelar_trl.official import load_official_checkpoint, official_name, save_official_checkpoint
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import batch, tiny, tiny_world_model
from tests.toy_runs import FINETUNE_ARGS, PRETRAIN_ARGS, configured

VIDEO = ("prelar", "apv", "contextwm")
MIXED = {"latent_action": "mixed", "latent_action_deter": 5}
CATEGORICAL = {"latent_action": "categorical", "latent_action_classes": 3}
CASES: list[
    tuple[str, dict[str, Any], dict[str, Any]]
] = [  # method, options of both, of the second
    ("naive", {"images": "context"}, {}),
    ("prelar", {}, {"action_window": 3}),
    ("prelar", CATEGORICAL, {"action_code": "categorical"}),
    *(("prelar", {**MIXED, "latent_action_classes": n}, {"action_code": "mixed"}) for n in (0, 3)),
    *((method, {"images": "cnn"}, {}) for method in ("prelar", "apv")),
    *((method, {}, {"concat_embed": True}) for method in ("apv", "contextwm")),
    *((method, {"hidden": 12, "deter": 20}, {}) for method in (*VIDEO, "dreamerv2")),
    *((method, {"norm": norm}, {}) for method in VIDEO for norm in ("layer", "group", "none")),
]


def pretrain_once(method: str, **options: Any) -> RSSMWorldModel:
    """One update of pre-training."""
    torch.manual_seed(0)
    model, loss = tiny(method, "pretrain", **options)
    before = copy.deepcopy(model)
    losses = WorldModelUpdate(loss)(batch(3, 7).exclude("action", "reward", "terminated"))
    check(model, before, losses)
    return model


def finetune_once(
    method: str,
    pretrained: RSSMWorldModel | None = None,
    weights: dict[str, float] | None = None,
    imag_batch: int | None = None,
    **options: Any,
) -> TensorDict:
    """One whole training step; the pre-trained weights are the agent's before it."""
    torch.manual_seed(1)
    agent, loss = tiny(method, "finetune", weights, **options)
    assert isinstance(agent, Agent)
    if pretrained is not None:
        copy_pretrained(agent.world_model, pretrained.state_dict())
        weight = pretrained_modules(agent.world_model)["rssm"].cell.linear.weight
        assert torch.equal(weight, pretrained.rssm.cell.linear.weight)
    td, before = batch(3, 7, terminated=torch.rand(3, 7, 1) < 0.1), copy.deepcopy(agent)
    losses = WorldModelUpdate(loss, frozen_updates=0 if pretrained else None)(td)
    start = losses.pop("state").update(td.select("terminated", "action"))
    losses.update(BehaviorUpdate(agent, horizon=3, imag_batch=imag_batch)(start))
    check(agent, before, losses)
    return losses


def check(module: torch.nn.Module, before: torch.nn.Module, losses: TensorDict) -> None:
    """Losses and parameters are finite, and every weight has moved.

    But for the prior of a stack's lower RSSM: the weight of ``af_kl`` is 0.
    """
    for name, value in losses.items():
        if name.startswith("loss_"):
            assert value.isfinite(), name
    old = dict(before.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name
        trained = parameter.requires_grad and "lower_rssm.prior" not in name
        if parameter.dim() > 1 and trained:
            assert not torch.equal(parameter, old[name]), name


@pytest.mark.parametrize(("method", "options", "fine"), CASES)
def test_an_option_trains_in_both_phases(method: str, options: dict, fine: dict) -> None:
    source = {"naive": "contextwm", "dreamerv2": None}.get(method, method)
    pretrained = pretrain_once(source, **options) if source else None
    finetune_once(method, pretrained, **options, **fine)


@pytest.mark.parametrize("method", ["prelar", "apv", "naive", "dreamerv2"])
def test_a_discount_head_learns_when_episodes_end(method) -> None:
    aux = ("aux_reward",) if method in ("prelar", "apv") else ()
    losses = finetune_once(method, weights={"discount": 1.0}, heads=("reward", "discount", *aux))
    assert losses["loss_discount"] > 0


@pytest.mark.parametrize("method", ["prelar", "apv", "dreamerv2"])
def test_imagination_from_some_of_the_states(method, monkeypatch) -> None:
    seen = []
    real = RSSMWorldModel.imagine

    def imagine(self, actor, start, *args):
        seen.append(start.shape)
        return real(self, actor, start, *args)

    monkeypatch.setattr(RSSMWorldModel, "imagine", imagine)
    finetune_once(method, imag_batch=5)
    assert seen == [(5,)]


# ---------------------------------------------------------------- context


@pytest.mark.parametrize("augmentation", ["shift", "shift4", "flip", "scale", "erasing"])
def test_context_augmentations_change_the_context_and_train(augmentation, monkeypatch) -> None:
    frames = []
    real = context.augment

    def augment(images, name):
        frames.append((images, real(images, name)))
        return frames[-1][1]

    monkeypatch.setattr(context, "augment", augment)
    pretrained = pretrain_once("contextwm", augmentation=augmentation)
    finetune_once("contextwm", pretrained, augmentation=augmentation)
    real_frames = [(a, b) for a, b in frames if a.shape[-1] == 64]  # not the constructor's trial
    assert len(real_frames) == 2
    assert any((a != b).any() for a, b in real_frames)


def test_a_context_checkpoint_without_position_embeddings_loads(tmp_path) -> None:
    model = pretrain_once("contextwm")
    save_official_checkpoint(tmp_path, model)
    for file in tmp_path.iterdir():
        state = torch.load(file)
        torch.save({k: x for k, x in state.items() if "pos_emb" not in k}, file)
    fresh = tiny_world_model("contextwm")
    load_official_checkpoint(tmp_path, fresh)
    positions = 0
    for name, tensor in fresh.state_dict().items():
        if "pos_emb" in official_name(name):
            positions += 1
            assert not tensor.any()
        else:
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert positions


def test_position_embeddings_train() -> None:
    model = pretrain_once("contextwm")
    moved = [x.any() for name, x in model.named_parameters() if "position" in name]
    assert moved and all(moved)


# ---------------------------------------------------------------- one more method


def test_a_method_is_one_entry(clips, tmp_path, monkeypatch) -> None:
    """PreLAR on plain CNNs with the contrast in place of the consistency, as ``my_method``."""
    monkeypatch.setitem(
        METHODS,
        "my_method",
        Method(
            pretrain={"actions": "latent", "images": "cnn"},
            pretrain_weights={**config.VIDEO, "latent_kl": 0.1, "action_contrast": 1.0},
            finetune={"actions": "encoded", "images": "cnn", "heads": ("reward",)},
            finetune_weights=config.REWARD,
            checkpoint=("my_method",),
        ),
    )
    runs = tmp_path / "runs"
    first = [*PRETRAIN_ARGS, "method=my_method", f"data={clips}", f"run={runs}/a", "updates=1"]
    pretrain(configured("pretrain", *first))
    second = [*FINETUNE_ARGS, "method=my_method", f"pretrained={runs}/a", f"run={runs}/b"]
    finetune(configured("finetune", *second, "env_steps=30", "eval_episodes=0"))
    metrics = (runs / "a" / "metrics.csv").read_text().partition("\n")[0]
    assert "loss_action_contrast" in metrics and "loss_action_state_consistency" not in metrics
    assert (runs / "b" / "checkpoints" / "last.pt").is_file()
