"""Fine-tuning that keeps what was learned: alignment of the action encoder, rehearsal of video."""

from __future__ import annotations

import copy
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from prelar_trl.checkpoint import load_checkpoint
from prelar_trl.models import copy_pretrained, make_world_model_loss
from prelar_trl.modules import ActionEncoder, make_latent_actions
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.record import RunFolder
from prelar_trl.rehearsal import Rehearsal
from prelar_trl.updates import Alignment, WorldModelUpdate
from tests.tiny import batch, tiny, tiny_world_model
from tests.toy_runs import (
    FINETUNE_ARGS,
    checkpoint,
    finetune_config,
    pretrain_config,
    rows,
)

CNN = {"images": "cnn"}
SHORT = {"eval_episodes": 0, "env_steps": 40, "model": CNN}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, x in module.state_dict().items() if not torch.equal(x, before[name])}


# ---------------------------------------------------------------- alignment


class Brightness(nn.Module):
    """Linear inverse model: the change of brightness, times 2 and times -1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, images: Tensor, flow: Tensor | None = None, sample: bool = True):
        assert not sample
        change = images.mean((2, 3, 4)).diff(dim=1, prepend=images[:, :1].mean((2, 3, 4)))
        return change.unsqueeze(-1) * self.scale, None  # [B, T, 2]


def brightness_batch(is_first: int | None = None) -> TensorDict:
    """Actions that make the picture brighter or darker by 20 levels each."""
    action = torch.randint(-1, 2, (16, 6, 1)).float()
    level = (128 + 20 * action.cumsum(1)).to(torch.uint8)
    first = torch.zeros(16, 6, 1, dtype=torch.bool)
    first[:, 0] = True
    if is_first is not None:
        first[:, is_first] = True
    pixels = level[..., None, None].expand(-1, -1, 3, 8, 8)
    td = {"pixels": pixels, "action": action, "is_first": first}
    return TensorDict(td, batch_size=[16, 6])


def linear_alignment() -> tuple[ActionEncoder, Brightness, Alignment]:
    torch.manual_seed(0)
    encoder = ActionEncoder(1, make_latent_actions("deterministic", size=2), hidden=16)
    inverse = Brightness()
    return encoder, inverse, Alignment(encoder, inverse, lr=1e-2)


def test_the_action_encoder_learns_the_inverse_models_latent_actions() -> None:
    encoder, inverse, alignment = linear_alignment()
    before = copy.deepcopy(inverse.state_dict())
    first = alignment(brightness_batch())
    for _ in range(150):
        last = alignment(brightness_batch())
    assert first["align_r2"] < 0.5 and last["align_r2"] > 0.98
    assert last["align_error"] < 1e-3 < first["align_error"]
    latent = encoder(torch.tensor([[[1.0], [-1.0]]]))[0]
    step = 20 / 255
    expected = torch.tensor([[[2 * step, -step], [-2 * step, step]]])
    torch.testing.assert_close(latent, expected, atol=0.05, rtol=0)
    assert not changed(inverse, before) and inverse.scale.grad is None
    assert alignment.count == 151


def test_transitions_into_a_first_frame_are_not_aligned() -> None:
    data = brightness_batch(is_first=3)
    strange = data.clone()
    strange["action"][:, [0, 3]] = 1e3
    states = []
    for each in (data, strange):
        encoder, _, alignment = linear_alignment()
        error = alignment(each)["align_error"]
        states.append({**encoder.state_dict(), "error": error})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_alignment_continues_exactly() -> None:
    data = [brightness_batch() for _ in range(4)]
    encoder, _, alignment = linear_alignment()
    again, _, continued = linear_alignment()
    for number, each in enumerate(data):
        if number == 2:
            again.load_state_dict(encoder.state_dict())
            continued.load_state_dict(copy.deepcopy(alignment.state_dict()))
        alignment(each)
        if number >= 2:
            continued(each)
    assert not changed(again, encoder.state_dict()) and continued.count == 4


# ---------------------------------------------------------------- rehearsal


def fine_and_pretrained(weights: dict[str, float], **model) -> SimpleNamespace:
    torch.manual_seed(0)
    pre = tiny_world_model(**model)
    agent, loss = tiny("prelar", "finetune", weights, **model)
    copy_pretrained(agent.world_model, pre.state_dict())
    inverse = copy.deepcopy(pre.latent_action_encoder).requires_grad_(False)
    return SimpleNamespace(pre=pre, agent=agent, loss=loss, inverse=inverse)


def test_rehearsed_terms_are_the_means_of_the_joint_batch() -> None:
    """Three rows of the environment, one of video, each computed by itself, with a CNN."""
    weights = {"kl": 0.5}
    made = fine_and_pretrained(weights, sample=False, **CNN)
    rehearsal = Rehearsal(made.loss, made.inverse, share=0.25)
    env, video = batch(3, 5), batch(1, 5).select("pixels", "is_first")
    alone = made.loss(env)
    mixed = rehearsal(alone, video)
    off = {"latent_kl": None, "action_state_consistency": None}
    of_video = make_world_model_loss("prelar", "pretrain", made.pre, weights={**weights, **off})
    parts = [made.loss(env[i : i + 1]) for i in range(3)] + [of_video(video)]
    for name in ("loss_image", "loss_kl"):
        expected = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(mixed[name], expected)
        term = name.removeprefix("loss_")
        torch.testing.assert_close(mixed[f"rehearsal_{term}"], parts[3][term])
    for name in ("loss_reward", "loss_aux_reward"):  # what video cannot give
        assert torch.equal(mixed[name], alone[name])


@pytest.mark.parametrize("kind", ["gaussian", "vq"])
def test_the_inverse_model_stands_still_and_the_running_statistics_are_the_environments(kind):
    env, video = batch(2, 5), batch(2, 5).select("pixels", "is_first")
    statistics = []
    for rehearse in (False, True):
        made = fine_and_pretrained({}, latent_action=kind)
        before = copy.deepcopy(made.inverse.state_dict())
        rehearsal = Rehearsal(made.loss, made.inverse, 0.5) if rehearse else None
        old = copy.deepcopy(made.agent.world_model.state_dict())
        WorldModelUpdate(made.loss, rehearsal=rehearsal)(env, *([video] if rehearse else []))
        assert not changed(made.inverse, before)
        state = made.agent.world_model.state_dict()
        statistics.append({n: x for n, x in state.items() if n.endswith(("_mean", "_var"))})
        assert set(statistics[-1]) <= changed(made.agent.world_model, old)
    assert len(statistics[0]) > 4
    torch.testing.assert_close(statistics[1], statistics[0])
    momenta = {m.momentum for m in made.agent.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_context_models_rehearse_with_their_context() -> None:
    agent, loss = tiny("naive", "finetune", images="context")
    rehearsal = Rehearsal(loss, None, 0.5)
    video = batch(2, 5).select("pixels", "is_first")
    out = WorldModelUpdate(loss, rehearsal=rehearsal)(batch(2, 5), video)
    assert out["loss_image"].isfinite() and out["rehearsal_kl"].isfinite()


def test_what_cannot_be_rehearsed() -> None:
    _, loss = tiny("apv", "finetune")
    with pytest.raises(ValueError, match="rehearse=0.5: a stacked world model cannot"):
        Rehearsal(loss, None, 0.5)
    _, loss = tiny("prelar", "finetune")
    with pytest.raises(ValueError, match="rehearse=1.5 must lie between 0 and 1"):
        Rehearsal(loss, None, 1.5)


# ---------------------------------------------------------------- in the recipe


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """Pre-training runs of one update."""
    folder = tmp_path_factory.mktemp("made")
    quick = {"updates": 1, "usage_every": 100, "model": CNN}
    for method in ("prelar", "apv"):
        cfg = pretrain_config(clips, folder / method, method=method, **copy.deepcopy(quick))
        pretrain(cfg)
    return SimpleNamespace(prelar=folder / "prelar", apv=folder / "apv")


def aligned_config(run, made, **changes):
    options = {"pretrained": str(made.prelar), "align_updates": 4, **copy.deepcopy(SHORT)}
    return finetune_config(run, **{**options, **changes})


def test_alignment_comes_before_the_first_update_and_is_logged(made, tmp_path, monkeypatch):
    order = []
    for kind in (Alignment, WorldModelUpdate):
        real = kind.__call__

        def call(self, batch, kind=kind, real=real):
            order.append(kind.__name__)
            return real(self, batch)

        monkeypatch.setattr(kind, "__call__", call)
    finetune(aligned_config(tmp_path / "a", made))
    assert order[:5] == ["Alignment"] * 4 + ["WorldModelUpdate"] and "Alignment" not in order[4:]
    logged = [row for row in rows(tmp_path / "a") if row["align_error"]]
    assert [row["step"] for row in logged] == ["20"]
    assert float(logged[0]["align_error"]) > 0 and logged[0]["align_r2"]


def spoiled_alignment(monkeypatch, first):
    """Its error is NaN from that update on."""
    real = Alignment.losses

    def losses(self, batch):
        losses = real(self, batch)
        return losses * float("nan") if self.count + 1 >= first else losses

    monkeypatch.setattr(Alignment, "losses", losses)


@pytest.mark.parametrize(("first", "most", "skipped"), [(2, 2, 2), (1, 10, 4), (4, 10, 1)])
def test_an_alignment_that_diverges_stops_the_run_with_its_own_batch(
    first, most, skipped, made, tmp_path, monkeypatch
):
    """After ``most`` in a row, or if its last update was skipped."""
    spoiled_alignment(monkeypatch, first)
    match = f"is nan at step 20, and the last {skipped} updates .* a lower align_lr"
    with pytest.raises(RuntimeError, match=match):
        finetune(aligned_config(tmp_path / "a", made, max_skipped=most))
    assert len(load_checkpoint(tmp_path / "a" / "not_finite.pt")["batches"]) == 1


def test_an_interrupted_alignment_is_finished_after_the_continuation(made, tmp_path, monkeypatch):
    counts = []
    real = Alignment.__call__

    def call(self, batch):
        if len(counts) == 1:
            signal.raise_signal(signal.SIGINT)
        out = real(self, batch)
        counts.append(self.count)
        return out

    monkeypatch.setattr(Alignment, "__call__", call)
    cfg = aligned_config(tmp_path / "a", made)
    with pytest.raises(SystemExit, match="resume=true"):
        finetune(cfg)
    state = checkpoint(tmp_path / "a")
    assert (state["alignment"]["count"], state["model_update"]["count"]) == (2, 0)
    cfg.resume = True
    finetune(cfg)
    assert counts == [1, 2, 3, 4]
    assert checkpoint(tmp_path / "a")["model_update"]["count"] > 0


def test_a_rehearsing_run_fills_its_batch_with_video_and_continues(made, tmp_path, monkeypatch):
    shapes, stop = [], None
    real = WorldModelUpdate.__call__

    def call(self, batch, video):
        shapes.append((*batch.shape, *video.shape))
        if self.count == stop:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, video)

    monkeypatch.setattr(WorldModelUpdate, "__call__", call)
    options = {"pretrained": str(made.prelar), "rehearse": 0.5, "batch_size": 4}
    finetune(finetune_config(tmp_path / "a", **options, **copy.deepcopy(SHORT)))
    assert set(shapes) == {(2, 6, 2, 6)}  # replay rows, steps, video rows, steps
    assert all(row["rehearsal_image"] for row in rows(tmp_path / "a") if row["loss_image"])
    cfg, stop = finetune_config(tmp_path / "b", **options, **copy.deepcopy(SHORT)), 1
    with pytest.raises(SystemExit):
        finetune(cfg)
    cfg.resume, stop = True, None
    finetune(cfg)
    whole, continued = (checkpoint(tmp_path / name) for name in "ab")
    assert whole["model_update"]["count"] == continued["model_update"]["count"]
    videos = [x["clips"]["sampler"]["rng"] for x in (whole, continued)]
    assert torch.equal(*videos)  # the video goes on where it was


def test_alignment_and_rehearsal_refuse_in_one_line(fails, made, tmp_path):
    def line(*arguments):
        start = [f"run={tmp_path / 'new'}", *FINETUNE_ARGS, "model.images=cnn"]
        found = fails("finetune", *start, *arguments)
        assert not (tmp_path / "new").exists()
        return found

    prelar, apv = (f"pretrained={getattr(made, name)}" for name in ("prelar", "apv"))
    assert "align_updates=3 needs a pre-training run" in line("method=prelar", "align_updates=3")
    assert "rehearse=0.5 needs a pre-training run" in line("method=prelar", "rehearse=0.5")
    assert "method=apv has no action encoder" in line("method=apv", apv, "align_updates=3")
    assert "a stacked world model cannot" in line("method=apv", apv, "rehearse=0.5")
    assert "rehearse=1.5 must lie" in line("method=prelar", prelar, "rehearse=1.5")
    found = line("method=prelar", prelar, "rehearse=0.5", "batch_size=1")
    assert "batch_size of at least 2, not 1" in found
    imported = shutil.copytree(made.prelar, tmp_path / "imported")
    text = (imported / "config.yaml").read_text()
    kept = [x for x in text.splitlines() if not x.startswith(("data:", "clip_len:", "heldout:"))]
    (imported / "config.yaml").write_text("\n".join(kept) + "\n")
    assert RunFolder.load(imported).config.get("data") is None
    found = line("method=prelar", f"pretrained={imported}", "rehearse=0.5")
    assert "was imported and names no videos" in found


def test_gray_models_rehearse_gray_video() -> None:
    made = fine_and_pretrained({}, gray=True)
    rehearsal = Rehearsal(made.loss, made.inverse, 0.5)
    out = WorldModelUpdate(made.loss, rehearsal=rehearsal)(
        batch(2, 5), batch(2, 5).select("pixels", "is_first")
    )
    assert out["rehearsal_image"].isfinite()
