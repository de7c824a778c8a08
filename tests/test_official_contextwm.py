"""Checkpoints of ContextWM's own release (thuml/ContextWM): the same tensors under other names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prelar_trl.official import (
    PARTS,
    load_official_checkpoint,
    official_action_dim,
    official_name,
    save_official_checkpoint,
)
from prelar_trl.recipes.import_official import import_official
from prelar_trl.recipes.schema import ImportOfficialConfig
from tests.test_official import assert_loads
from tests.tiny import ACTION_DIM, TINY, batch, tiny
from tests.toy_runs import checkpoint, different

# As their modules are registered: wmlib/nets and wmlib/agents. Ours -> theirs.
NAMES = {
    "encoder.conv_in.weight": "wm.encoder.convin.weight",
    "encoder.stages.1.0.skip.0.weight": "wm.encoder.res1.stack.0.identity.0.weight",
    "context_encoder.net.conv_in.bias": "wm.encoder.cond_convin.bias",
    "context_encoder.net.stages.0.0.block.1.running_var": (
        "wm.encoder.cond_res0.stack.0.res_block.1.running_var"
    ),
    "decoder.linear_in.weight": "wm.heads.decoder.convin.weight",
    "decoder.stages.1.0.attention.in_proj_weight": (
        "wm.heads.decoder.res1.stack.0.cross_attention.att.in_proj_weight"
    ),
    "decoder.stages.0.0.query_position": "wm.heads.decoder.res0.stack.0.q_pos_emb",
    "decoder.conv_out.bias": "wm.heads.decoder.convout.bias",
    "lower_rssm.input_layer.weight": "wm.af_rssm.img_in.weight",
    "rssm.cell.linear.weight": "wm.rssm._cell._layer.weight",
    "rssm.prior_heads.0.0.bias": "wm.rssm.img_out_0.bias",
    "rssm.prior_heads.0.2.weight": "wm.rssm.img_dist_0.weight",
    "rssm.posterior_hidden.weight": "wm.rssm.obs_out.weight",
    "rssm.posterior_out.bias": "wm.rssm.obs_dist.bias",
    "heads.reward.layers.0.weight": "wm.heads.reward.dense0.weight",
    "heads.aux_reward.out.bias": "wm.heads.aux_reward.out.out.bias",
    "actor.std_out.weight": "_task_behavior.actor.out.std.weight",
    "slow_critic.out.weight": "_task_behavior._target_critic.out.out.weight",
    "video_bonus.projection": "wm.intr_bonus.random_projection_matrix",
}


def contextwm_name(name: str) -> str:
    """PreLAR's name of a tensor as ContextWM's release has it."""
    name = re.sub(r"_deco_net\.convin\.0\.", "cond_convin.", name)
    name = name.replace("_deco_net.", "cond_").replace("_cnn_net.", "").replace("_cnn_nn.", "")
    name = name.replace("decoder.convin.0.", "decoder.convin.")
    name = re.sub(r"_ensemble_out_layers\.\d\.img_out_head_", "img_dist_", name)
    name = re.sub(r"_ensemble_out_layers\.\d\.", "", name)
    name = name.replace("._img_in.0.", ".img_in.").replace("._obs_out.0.", ".obs_out.")
    name = name.replace("._obs_out.obs_out_head.", ".obs_dist.")
    name = name.replace("._mlp_nn.dense_", ".dense")
    return name.replace("._out_dist._out_nn.", ".out.out.").replace(
        "._out_dist._std_nn.", ".out.std."
    )


def rename_files(folder: Path) -> None:
    for file in folder.iterdir():
        prefix = PARTS.get(file.name, "")
        state: dict[str, Tensor] = torch.load(file)
        renamed = {contextwm_name(prefix + k).removeprefix(prefix): x for k, x in state.items()}
        assert renamed.keys() != state.keys() and len(renamed) == len(state)
        torch.save(renamed, file)


def test_the_names_are_those_of_the_release() -> None:
    for ours, theirs in NAMES.items():
        assert contextwm_name(official_name(ours)) == theirs


@pytest.mark.parametrize("method", ["contextwm", "apv", "dreamerv2"])
def test_an_agent_is_loaded(method: str, tmp_path: Path) -> None:
    model, loss = tiny(method, "finetune")
    loss(batch())  # fills the bonus memory and the statistics of batch norm
    save_official_checkpoint(tmp_path, model)
    rename_files(tmp_path)
    assert_loads(tmp_path, model, tiny(method, "finetune")[0])
    assert official_action_dim(tmp_path) == ACTION_DIM


@pytest.mark.parametrize("method", ["contextwm", "apv"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_pretraining_run_is_imported(method: str, whole: bool, tmp_path: Path) -> None:
    model, theirs = tiny(method, "pretrain")[0], tmp_path / "theirs"
    save_official_checkpoint(theirs, model)
    rename_files(theirs)
    if not whole:
        (theirs / "variables.pt").unlink()
    assert_loads(theirs, model, tiny(method, "pretrain")[0])
    settings = {"method": method, "size": "tiny", "model": TINY}
    import_official(
        ImportOfficialConfig(official=str(theirs), run=str(tmp_path / "run"), **settings)
    )
    assert different(dict(model.state_dict()), checkpoint(tmp_path / "run")["model"]) == []


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model, _ = tiny("contextwm", "pretrain")
    save_official_checkpoint(tmp_path, model)
    rename_files(tmp_path)
    state = torch.load(tmp_path / "variables.pt")
    state.pop("wm.encoder.cond_convin.weight")
    torch.save(state, tmp_path / "variables.pt")
    with pytest.raises(ValueError, match=r"1 tensors differ \(wm\.encoder\._deco_net\.convin"):
        load_official_checkpoint(tmp_path, model)
