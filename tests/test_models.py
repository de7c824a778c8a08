"""The presets: every method by name, its parts, its size, and loading a pre-training run."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.config import model_settings
from prelar_trl.models import (
    copy_pretrained,
    make_agent,
    make_world_model,
    make_world_model_loss,
    pretrained_modules,
)
from prelar_trl.modules import (
    CNNEncoder,
    ContextDecoder,
    ResNetEncoder,
)
from prelar_trl.objectives import total_loss
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import PHASES, batch, tiny, tiny_agent, tiny_world_model

# Of the authors' code at full size, Meta-world's four actions.
PARAMETERS = {
    ("prelar", "pretrain"): 28_682_635,
    ("prelar_no_al_cl", "pretrain"): 28_617_035,
    ("apv", "pretrain"): 23_826_939,
    ("contextwm", "pretrain"): 25_648_827,
    ("prelar", "finetune"): 30_814_023,
    ("apv", "finetune"): 44_294_919,
    ("contextwm", "finetune"): 46_116_807,
    ("naive", "finetune"): 29_034_550,
    ("dreamerv2", "finetune"): 31_036_830,
}


HEADS = {"heads": ("reward", "aux_reward", "discount")}


@pytest.mark.parametrize(("method", "phase"), PARAMETERS)
def test_parameter_counts_at_full_size_are_the_authors(method: str, phase: str) -> None:
    with torch.device("meta"):
        if phase == "pretrain":
            model = make_world_model(method, "pretrain", action_dim=4)
        else:
            model = make_agent(method, action_dim=4)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[method, phase]


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_every_method_builds_and_trains_one_update(method: str, phase: str) -> None:
    model, loss = tiny(method, phase)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = WorldModelUpdate(loss)(batch())
    assert total_loss(out).isfinite() and not total_loss(out).requires_grad
    assert all(p.isfinite().all() for p in model.parameters())
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if phase == "finetune":
        assert moved == {"world_model"}
        state = out["state"].update(batch().select("terminated", "action"))
        behaved = BehaviorUpdate(model, horizon=3)(state)
        assert behaved["loss_actor"].isfinite() and behaved["loss_critic"].isfinite()
    else:
        assert {"encoder", "decoder", "rssm"} <= moved


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_every_method_has_every_size(method: str, phase: str, size: str) -> None:
    with torch.device("meta"):
        models = [make_world_model(method, phase, action_dim=4, size=x) for x in (size, "full")]
    count, full = (sum(p.numel() for p in model.parameters()) for model in models)
    assert count < 0.4 * full


def test_methods_have_their_published_parts() -> None:
    fine = {
        method: model_settings(method, phase) for method, phase in PHASES if phase == "finetune"
    }
    assert {m for m, s in fine.items() if s.stacked} == {"apv", "contextwm"}
    assert fine["apv"].action_width == model_settings("apv", "pretrain").action_width == 50
    for method in ("prelar", "prelar_no_cl", "prelar_no_al_cl"):
        kind = "deterministic" if method == "prelar_no_al_cl" else "gaussian"
        assert model_settings(method, "pretrain").latent_action == kind
        assert fine[method].heads == ("reward", "aux_reward")
    for method in ("naive", "prelar_naive", "dreamerv2"):
        assert fine[method].heads == ("reward",) and fine[method].bonus_embed is None
    model = tiny_world_model("contextwm", "finetune")
    assert isinstance(model.decoder, ContextDecoder) and model.context_encoder is not None
    assert isinstance(tiny_world_model("dreamerv2", "finetune").encoder, CNNEncoder)
    assert isinstance(tiny_world_model("naive", "finetune").encoder, ResNetEncoder)


def test_methods_have_their_published_losses() -> None:
    expected = {
        ("prelar", "pretrain"): {"image", "kl", "latent_kl", "action_state_consistency"},
        ("prelar_no_cl", "pretrain"): {"image", "kl", "latent_kl"},
        ("prelar_no_al_cl", "pretrain"): {"image", "kl"},
        ("apv", "pretrain"): {"image", "kl"},
        ("prelar", "finetune"): {"image", "kl", "reward", "aux_reward"},
        ("apv", "finetune"): {"image", "kl", "reward", "aux_reward"},
        ("naive", "finetune"): {"image", "kl", "reward"},
        ("dreamerv2", "finetune"): {"image", "kl", "reward"},
    }
    for (method, phase), terms in expected.items():
        _, loss = tiny(method, phase)
        losses = {key[5:] for key in loss(batch()).keys() if key.startswith("loss_")}
        assert losses == terms, (method, phase)


@pytest.mark.parametrize(
    "options",
    [
        {"frames": "diff"},
        {"frames": "catdiff"},
        {"classes": 0},
        {"images": "context", "augmentation": "erasing"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_combine_with_all_losses(options: dict) -> None:
    _, loss = tiny("prelar", "pretrain", weights={"action_contrast": 0.5}, **options)
    assert total_loss(WorldModelUpdate(loss)(batch())).isfinite()


def test_heads_that_are_drawn_at_random_are_not_compared_as_actions() -> None:
    with pytest.raises(ValueError, match=r"ensemble=3: the consistency would compare heads"):
        tiny("prelar", "pretrain", ensemble=3)
    _, loss = tiny("prelar_no_cl", "pretrain", weights={"action_contrast": 0.5}, ensemble=3)
    assert total_loss(WorldModelUpdate(loss)(batch())).isfinite()


def test_optical_flow_can_take_the_place_of_the_frames() -> None:
    model, loss = tiny("prelar", "pretrain", frames="flow")
    assert "flow" in loss.in_keys
    data = batch()
    with pytest.raises(KeyError, match="flow"):
        loss(data)
    assert total_loss(loss(data.update({"flow": data["pixels"]}))).isfinite()
    assert "action" not in model.in_keys


def test_single_weights_can_be_changed_removed_and_added() -> None:
    weights = {"kl": 0.1, "action_state_consistency": None, "action_contrast": 2.0}
    _, loss = tiny("prelar", "pretrain", weights=weights)
    out = loss(batch())
    torch.testing.assert_close(out["loss_kl"].detach(), 0.1 * out["kl"])
    torch.testing.assert_close(out["loss_action_contrast"].detach(), 2 * out["action_contrast"])
    assert "action_state_consistency" not in out.keys()


@pytest.mark.parametrize(
    ("method", "phase", "options", "message"),
    [
        ("dreamer", "pretrain", {}, "method='dreamer' is unknown; choose dreamerv2, apv"),
        ("prelar", "train", {}, "phase='train' is unknown; choose pretrain or finetune"),
        ("naive", "pretrain", {}, "method=naive has no phase 'pretrain'"),
        (
            "prelar",
            "pretrain",
            {"size": "huge"},
            "size='huge' is unknown; choose full, small, tiny",
        ),
        ("prelar", "pretrain", {"width": 3}, "unknown setting 'width'"),
        ("prelar", "pretrain", {"norm": "instance"}, "norm='instance' is unknown"),
        ("prelar", "pretrain", {"images": "vit"}, "images='vit' is unknown"),
    ],
)
def test_unknown_names_are_errors_that_name_the_choices(method, phase, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_world_model(method, phase, action_dim=2, **options)


# ---------------------------------------------------------------------- pre-training runs


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("prelar", "prelar"),
        ("prelar_naive", "prelar_no_al_cl"),
        ("apv", "apv"),
        ("contextwm", "contextwm"),
        ("naive", "apv"),
        ("naive", "contextwm"),
    ],
)
def test_finetuning_takes_encoder_decoder_and_rssm(method: str, source: str) -> None:
    images = {"images": "context"} if source == "contextwm" else {}
    state = tiny_world_model(source, "pretrain").state_dict()
    model = tiny_world_model(method, "finetune", **images)
    own = {k: x.clone() for k, x in model.state_dict().items()}
    copy_pretrained(model, state)
    for name, module in pretrained_modules(model).items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[f"{name}.{key}"])
    kept = ("heads.", "rssm.") if model.lower_rssm is not None else ("heads.",)
    for key, value in model.state_dict().items():
        assert not key.startswith(kept) or torch.equal(value, own[key])


def test_pretraining_of_another_size_is_an_error_and_nothing_is_copied() -> None:
    model = tiny_world_model("prelar", "finetune")
    before = {k: x.clone() for k, x in model.state_dict().items()}
    state = tiny_world_model("prelar", "pretrain", deter=24, hidden=24).state_dict()
    with pytest.raises(ValueError, match=r"rssm\..* is \(.*\) there and \(.*\) here"):
        copy_pretrained(model, state)
    state = tiny_world_model("prelar", "pretrain").state_dict()
    state.pop("encoder.conv_in.bias")
    with pytest.raises(ValueError, match="1 tensors differ .*encoder.conv_in.bias is missing"):
        copy_pretrained(model, state)
    state = tiny_world_model("prelar", "pretrain", ensemble=2).state_dict()
    with pytest.raises(ValueError, match="rssm.prior_heads.1.0.bias has no place"):
        copy_pretrained(model, state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("method", "phase", "options", "settings", "message"),
    [
        ("prelar", "finetune", HEADS, {}, "'discount' needs both .* a head only"),
        ("prelar", "finetune", {"heads": ("reward",)}, {}, "'aux_reward' needs .* a weight only"),
        ("prelar", "finetune", {}, {"weights": {"af_kl": 1.0}}, "no lower RSSM"),
        ("prelar", "pretrain", {}, {"weights": {"rank": 1.0}}, "unknown loss weight 'rank'"),
        ("prelar", "pretrain", {}, {"weights": {"bogus": None}}, "unknown loss weight 'bogus'"),
        ("prelar", "pretrain", {}, {"weight": {}}, "unknown setting 'weight'"),
        (
            "apv",
            "pretrain",
            {},
            {"weights": {"latent_kl": 1.0}},
            "apv has no latent actions in pha",
        ),
    ],
)
def test_heads_and_weights_must_agree(method, phase, options, settings, message) -> None:
    model = tiny_world_model(method, phase, **options)
    with pytest.raises(ValueError, match=message):
        make_world_model_loss(method, phase, model, **settings)


# ---------------------------------------------------------------------- agents


def test_slow_critic_starts_as_a_frozen_copy_of_the_critic() -> None:
    agent = tiny_agent()
    pairs = zip(agent.critic.parameters(), agent.slow_critic.parameters(), strict=True)
    for own, slow in pairs:
        assert torch.equal(own, slow) and own is not slow
        assert own.requires_grad and not slow.requires_grad


# --------------------------------------------------------------- networks of one's own


class OwnEncoder(torch.nn.Linear):
    embed_dim = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.mean((2, 3)))


class OwnDecoder(torch.nn.Linear):
    def forward(self, feat: torch.Tensor) -> torch.Tensor:
        return super().forward(feat)[..., None, None].expand(-1, 3, 64, 64)


def test_networks_of_ones_own_keep_their_weights() -> None:
    features = tiny_world_model("dreamerv2", "finetune").rssm.feat_dim
    encoder, decoder = OwnEncoder(3, 4), OwnDecoder(features, 3)
    own = torch.nn.ModuleList([encoder, decoder])
    before = {name: x.clone() for name, x in own.state_dict().items()}
    model = tiny_world_model("dreamerv2", "finetune", encoder=encoder, decoder=decoder)
    assert model.encoder is encoder and model.decoder is decoder
    torch.testing.assert_close(dict(own.state_dict()), before, rtol=0, atol=0)
    assert model.heads["reward"].out.bias.count_nonzero() == 0  # of the others


def test_a_bonus_of_a_lower_rssm_needs_one() -> None:
    with pytest.raises(ValueError, match="method=prelar has no lower RSSM"):
        make_agent("prelar", action_dim=2, size="mini", bonus_embed="lower")
