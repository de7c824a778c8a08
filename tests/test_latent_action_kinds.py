"""Kinds of latent actions through the recipes: one from outside the package, FSQ and VQ."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from prelar_trl.modules.latent_actions import base
from prelar_trl.recipes.entry import start
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.probe import probe
from prelar_trl.recipes.schema import ProbeConfig
from tests.toy_runs import (
    PRETRAIN_ARGS,
    checkpoint,
    different,
    finetune_config,
    interrupt_after,
    pretrain_config,
    rows,
    shorten_mlp_probe,
)

OUTSIDE = '''
import torch
from prelar_trl.modules.latent_actions import LatentActions, register_latent_actions


@register_latent_actions("bounded")
class Bounded(LatentActions):
    """tanh of the output over its running size; its own loss keeps the actions small."""

    default_weights = {"magnitude": 0.1}

    def __init__(self, *, size, decay=0.9):
        super().__init__(size=size)
        self.num_outputs = self.dim = size
        self.decay = decay
        self.register_buffer("running", torch.ones(size))

    def forward(self, raw, sample=True):
        if self.training:
            self.running.lerp_(raw.detach().flatten(0, -2).abs().mean(0), 1 - self.decay)
        return torch.tanh(raw / (self.running + 1e-3)), None

    def extra_losses(self, action, params):
        return {"magnitude": action.square().mean()}
'''
INVERSE, CODE = "latent_action_encoder.latent_actions.", "action_encoder.latent_actions."


def last(run, name):
    """The last value of a metric; it shares its step, not its row, with others."""
    return float([row[name] for row in rows(run) if row[name]][-1])


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_mlp_probe(monkeypatch)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A file of one's own that Python finds; nothing of it stays."""
    (tmp_path / "own_actions.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    yield "own_actions"
    sys.modules.pop("own_actions", None)


def fine(run, pre, code, model, **changes):
    """Fine-tunes from ``pre`` with the given code of actions; returns the checkpoint."""
    options = {"env_steps": 40, "eval_episodes": 0, "pretrained": str(pre), "align_updates": 2}
    options |= {"trust_code": True}
    finetune(finetune_config(run, model={**model, "action_code": code}, **{**options, **changes}))
    return checkpoint(run)["agent"]


def test_a_kind_from_outside_pretrains_is_probed_and_is_finetuned(outside, clips, tmp_path) -> None:
    model = {
        "images": "cnn",
        "latent_action": f"{outside}:Bounded",
        "latent_action_options": {"decay": 0.5},
    }
    pre = tmp_path / "pre"
    loss = {"weights": {"magnitude": 0.25}}
    pretrain(pretrain_config(clips, pre, model=dict(model), loss=loss))
    state = checkpoint(pre)["model"]
    assert not torch.equal(state[INVERSE + "running"], torch.ones(4))
    table = rows(pre)[0].keys()
    assert "action_usage" in table and "loss_latent_kl" not in table  # it has no parameters
    plain, weighted = tmp_path / "plain", last(pre, "loss_magnitude")
    pretrain(pretrain_config(clips, plain, model=dict(model), updates=1))
    first = float(rows(pre)[0]["loss_magnitude"])
    assert 0 < weighted and first == pytest.approx(2.5 * last(plain, "loss_magnitude"), rel=1e-4)

    result = probe(ProbeConfig(run=str(pre), clips=5, batch_size=5, device="cpu", trust_code=True))
    assert "contrast/accuracy" in result["values"] and "action_r2/latent_action" in result["values"]

    agent = fine(tmp_path / "same", pre, f"{outside}:Bounded", model)
    assert torch.equal(agent["world_model." + CODE + "running"], state[INVERSE + "running"])
    agent = fine(tmp_path / "deterministic", pre, "deterministic", model)
    assert not any(name.endswith("running") for name in agent)


def test_a_registered_name_is_one_value_of_the_command(
    outside, clips, tmp_path, monkeypatch
) -> None:
    importlib.import_module(outside)
    run = tmp_path / "run"
    arguments = [f"data={clips}", f"run={run}", *PRETRAIN_ARGS, "updates=1", "model.images=cnn"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments, "model.latent_action=bounded"])
    start("pretrain")
    assert 0 < last(run, "loss_magnitude") <= 0.1  # the weight that the kind names
    assert INVERSE + "running" in checkpoint(run)["model"]


KINDS = {
    "fsq": ({"levels": [5, 3]}, {"code_perplexity"}),
    "vq": ({"codes": 6}, {"code_perplexity", "codes_used", "loss_commitment"}),
}


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, clips, tmp_path_factory):
    """A pre-training run of three updates."""
    kind, run = request.param, tmp_path_factory.mktemp(request.param) / "pre"
    model = {"images": "cnn", "latent_action": kind, "latent_action_options": KINDS[kind][0]}
    pretrain(pretrain_config(clips, run, model=dict(model)))
    return SimpleNamespace(kind=kind, run=run, model=model, clips=clips)


def test_use_of_the_codes_is_logged_and_a_codebook_is_probed(quantized) -> None:
    table = rows(quantized.run)
    for name in KINDS[quantized.kind][1]:
        values = [float(row[name]) for row in table if row[name]]
        assert len(values) == 3, name
        if name == "code_perplexity":
            assert all(1 <= x <= 15.001 for x in values)
    if quantized.kind == "vq":  # a probe reads the vectors of both in one way
        result = probe(ProbeConfig(run=str(quantized.run), clips=5, batch_size=5, device="cpu"))
        assert "contrast/accuracy" in result["values"]


def test_quantized_pretraining_continues_bit_for_bit(quantized, tmp_path, monkeypatch) -> None:
    cfg = pretrain_config(quantized.clips, tmp_path / "a", model=dict(quantized.model))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit):
            pretrain(cfg)
    cfg.resume = True
    pretrain(cfg)
    assert different(checkpoint(quantized.run), checkpoint(tmp_path / "a")) == []


@pytest.mark.parametrize("code", ["same", "deterministic"])
def test_quantized_actions_are_finetuned_with_their_codebook(quantized, code, tmp_path) -> None:
    code = quantized.kind if code == "same" else code
    agent = fine(tmp_path / "fine", quantized.run, code, quantized.model)
    learned = {
        name.removeprefix(INVERSE): x
        for name, x in checkpoint(quantized.run)["model"].items()
        if name.startswith(INVERSE)
    }
    assert set(learned) == ({"codebook", "sums", "usage"} if quantized.kind == "vq" else set())
    carried = {n.split(CODE)[1]: x for n, x in agent.items() if CODE in n}
    assert different(learned if code == quantized.kind else {}, carried) == []
