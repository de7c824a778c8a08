"""What the authors' options offer but their code fails on: each trains here, in both phases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tensordict import TensorDict

from prelar_trl import config
from prelar_trl.config import METHODS, Method
from prelar_trl.models import (
    Agent,
    load_pretrained,
    make_agent,
    make_world_model,
    make_world_model_loss,
    pretrained_modules,
)
from prelar_trl.modules import RSSMWorldModel, context
from prelar_trl.official import load_official_checkpoint, official_name, save_official_checkpoint
from prelar_trl.recipes.entry import settings
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.toy_runs import FINETUNE_ARGS, PRETRAIN_ARGS, ROOT, TINY, make_clips

ACTIONS, SEQUENCES, STEPS = 2, 3, 7


def batch() -> TensorDict:
    is_first = torch.zeros(SEQUENCES, STEPS, 1, dtype=torch.bool)
    is_first[:, 0] = True
    shape = (SEQUENCES, STEPS)
    return TensorDict(
        {
            "pixels": torch.randint(0, 256, (*shape, 3, 64, 64), dtype=torch.uint8),
            "action": torch.rand(*shape, ACTIONS) * 2 - 1,
            "reward": torch.randn(*shape, 1),
            "is_first": is_first,
            "terminated": torch.rand(*shape, 1) < 0.1,
        },
        batch_size=shape,
    )


def pretrain_once(
    method: str, loss: dict[str, Any] | None = None, **options: Any
) -> RSSMWorldModel:
    """One update of pre-training."""
    torch.manual_seed(0)
    model = make_world_model(method, "pretrain", action_dim=0, size="tiny", **{**TINY, **options})
    objective = make_world_model_loss(method, "pretrain", model, **(loss or {}))
    before = copy.deepcopy(model)
    losses = WorldModelUpdate(objective)(batch().exclude("action", "reward", "terminated"))
    check(model, before, losses)
    return model


def finetune_once(
    method: str,
    pretrained: RSSMWorldModel | None = None,
    loss: dict[str, Any] | None = None,
    behavior: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Agent, TensorDict]:
    """One whole training step; the pre-trained weights are the agent's before it."""
    torch.manual_seed(1)
    agent = make_agent(method, action_dim=ACTIONS, size="tiny", **{**TINY, **options})
    if pretrained is not None:
        load_pretrained(agent.world_model, pretrained.state_dict())
        weight = pretrained_modules(agent.world_model)["rssm"].cell.linear.weight
        assert torch.equal(weight, pretrained.rssm.cell.linear.weight)
    objective = make_world_model_loss(
        method, "finetune", agent.world_model, video_bonus=agent.video_bonus, **(loss or {})
    )
    td, before = batch(), copy.deepcopy(agent)
    losses = WorldModelUpdate(objective, frozen_updates=0 if pretrained else None)(td)
    start = losses.pop("state").update(td.select("terminated", "action"))
    update = BehaviorUpdate(agent, horizon=3, **(behavior or {}))
    losses.update(update(start))
    check(agent, before, losses)
    return agent, losses


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


# ---------------------------------------------------------------- components


def test_naive_with_context_networks() -> None:
    pretrained = pretrain_once("contextwm")
    agent, _ = finetune_once("naive", pretrained, images="context")
    assert agent.world_model.context_encoder is not None
    assert "contextwm" in METHODS["naive"].checkpoint


@pytest.mark.parametrize("method", ["prelar", "apv", "naive", "dreamerv2"])
def test_a_discount_head_learns_when_episodes_end(method) -> None:
    aux = ("aux_reward",) if method in ("prelar", "apv") else ()
    _, losses = finetune_once(
        method, heads=("reward", "discount", *aux), loss={"weights": {"discount": 1.0}}
    )
    assert losses["loss_discount"] > 0
    assert losses["loss_actor"].isfinite()


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
@pytest.mark.parametrize("method", ["prelar", "apv", "contextwm"])
def test_other_norms_than_batch_norm(method, norm) -> None:
    pretrained = pretrain_once(method, norm=norm)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in pretrained.modules())
    finetune_once(method, pretrained, norm=norm)


@pytest.mark.parametrize("method", ["prelar", "apv", "contextwm"])
def test_hidden_may_differ_from_deter(method) -> None:
    pretrained = pretrain_once(method, hidden=12, deter=20)
    finetune_once(method, pretrained, hidden=12, deter=20)


def test_hidden_may_differ_from_deter_without_pretraining() -> None:
    finetune_once("dreamerv2", hidden=12, deter=20)


@pytest.mark.parametrize("method", ["prelar", "apv", "dreamerv2"])
def test_imagination_from_some_of_the_states(method, monkeypatch) -> None:
    seen = []
    real = RSSMWorldModel.imagine

    def imagine(self, actor, start, *args):
        seen.append(start.shape)
        return real(self, actor, start, *args)

    monkeypatch.setattr(RSSMWorldModel, "imagine", imagine)
    finetune_once(method, behavior={"imag_batch": 5})
    assert seen == [(5,)]


@pytest.mark.parametrize("classes", [0, 3])
def test_mixed_latent_actions_fit_mixed_action_codes(classes) -> None:
    code = {"latent_action_classes": classes, "latent_action_deter": 5}
    pretrained = pretrain_once("prelar", latent_action="mixed", **code)
    agent, _ = finetune_once("prelar", pretrained, action_code="mixed", **code)
    width = 5 + TINY["latent_action_size"] * max(classes, 1)
    assert agent.world_model.rssm.action_dim == pretrained.rssm.action_dim == width


def test_categorical_latent_actions_fit_categorical_action_codes() -> None:
    pretrained = pretrain_once("prelar", latent_action="categorical", latent_action_classes=3)
    finetune_once("prelar", pretrained, action_code="categorical", latent_action_classes=3)


@pytest.mark.parametrize("method", ["apv", "contextwm"])
def test_the_upper_rssm_of_a_stack_may_also_read_the_image(method) -> None:
    agent, _ = finetune_once(method, pretrain_once(method), concat_embed=True)
    model = agent.world_model
    assert model.rssm.embed_dim == model.lower_rssm.feat_dim + model.encoder.embed_dim


@pytest.mark.parametrize("method", ["prelar", "apv"])
def test_plain_cnn(method) -> None:
    pretrained = pretrain_once(method, images="cnn")
    agent, _ = finetune_once(method, pretrained, images="cnn")
    assert type(agent.world_model.encoder).__name__ == "CNNEncoder"


def test_an_action_window() -> None:
    agent, _ = finetune_once("prelar", pretrain_once("prelar"), action_window=3)
    assert agent.world_model.action_encoder.window == 3


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
    fresh = make_world_model("contextwm", "pretrain", action_dim=0, size="tiny", **TINY)
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


def test_a_method_is_one_entry(tmp_path, monkeypatch) -> None:
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
    data, runs = make_clips(tmp_path / "clips"), tmp_path / "runs"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        first = [*PRETRAIN_ARGS, "method=my_method", f"data={data}", f"run={runs}/a", "updates=1"]
        pretrain(settings(compose("pretrain", first)))
        second = [*FINETUNE_ARGS, "method=my_method", f"pretrained={runs}/a", f"run={runs}/b"]
        finetune(settings(compose("finetune", [*second, "env_steps=30", "eval_episodes=0"])))
    metrics = (runs / "a" / "metrics.csv").read_text().partition("\n")[0]
    assert "loss_action_contrast" in metrics and "loss_action_state_consistency" not in metrics
    assert (runs / "b" / "checkpoints" / "last.pt").is_file()
