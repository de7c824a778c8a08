"""Checkpoints of the authors' code: reading and writing their weight layout.

PreLAR's layout is meant; that of ContextWM's own release (thuml/ContextWM: also DreamerV2 and APV)
has the same tensors under other names, and is read too.

A folder holds ``variables.pt`` (the whole agent), or the parts ``rssm_variables.pt``,
``encoder_variables.pt``, ``decoder_variables.pt``, ``va_encoder_variables.pt``: PyTorch state
dicts. They are read as weights only; no code in a file is ever run.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from prelar_trl.checkpoint import DamagedFileError, read_tensors
from prelar_trl.models import Agent
from prelar_trl.utils import atomic_write

__all__ = [
    "load_official_checkpoint",
    "official_action_dim",
    "official_name",
    "read_official",
    "save_official_checkpoint",
]

PARTS = {
    "rssm_variables.pt": "wm.rssm.",
    "encoder_variables.pt": "wm.encoder.",
    "decoder_variables.pt": "wm.heads.decoder.",
    "va_encoder_variables.pt": "wm.va_encoder.",
}

# Ours -> theirs, applied in order: first the component, then what is inside it.
COMPONENTS = [
    (r"^encoder\.convs\.(\d+)", r"wm.encoder._cnn_nn.conv\1"),
    (r"^encoder\.conv_in", "wm.encoder._cnn_net.convin"),
    (r"^encoder\.", "wm.encoder._cnn_net."),
    (r"^context_encoder\.net\.conv_in", "wm.encoder._deco_net.convin.0"),
    (r"^context_encoder\.net\.", "wm.encoder._deco_net."),
    (r"^decoder\.linear_in", "wm.heads.decoder.convin.0"),
    (r"^decoder\.conv_out", "wm.heads.decoder.convout"),
    (r"^decoder\.convs\.(\d+)", r"wm.heads.decoder._cnn_nn.conv\1"),
    (r"^decoder\.", "wm.heads.decoder._cnn_nn."),
    (r"^lower_rssm\.", "wm.af_rssm."),
    (r"^rssm\.", "wm.rssm."),
    (r"^latent_action_encoder\.encoder\.conv_in", "wm.va_encoder.va_encoder._cnn_net.convin"),
    (r"^latent_action_encoder\.encoder\.", "wm.va_encoder.va_encoder._cnn_net."),
    (r"^latent_action_encoder\.head\.", "wm.va_encoder.action_in."),
    (r"^heads\.", "wm.heads."),
    (r"^slow_critic\.", "_task_behavior._target_critic."),
    (r"^(actor|critic)\.", r"_task_behavior.\1."),
    (r"^video_bonus\.projection", "wm.intr_bonus.random_projection_matrix"),
    (r"^video_bonus\.memory", "wm.intr_bonus.queue"),
    (r"^video_bonus\.magnitude", "wm.intr_bonus.intr_rewnorm.mag"),
]
INSIDE = [
    (r"\bstages\.(\d+)\.(\d+)\.skip\.", r"res\1.stack.\2.identity."),
    (r"\bstages\.(\d+)\.(\d+)\.block\.", r"res\1.stack.\2.res_block."),
    (r"\bstages\.(\d+)\.(\d+)\.attention_norm\.0\.", r"res\1.stack.\2.norm_cross_att."),
    (r"\bstages\.(\d+)\.(\d+)\.attention\.", r"res\1.stack.\2.cross_attention.att."),
    (r"\bstages\.(\d+)\.(\d+)\.query_position", r"res\1.stack.\2.q_pos_emb"),
    (r"\bstages\.(\d+)\.(\d+)\.key_position", r"res\1.stack.\2.kv_pos_emb"),
    (r"rssm\.input_layer\.", "rssm._img_in.0."),
    (r"rssm\.cell\.linear\.", "rssm._cell._layer."),
    (r"rssm\.cell\.norm\.", "rssm._cell._norm."),
    (r"rssm\.prior_heads\.(\d+)\.0\.", r"rssm._ensemble_out_layers.\1.img_out_\1."),
    (r"rssm\.prior_heads\.(\d+)\.2\.", r"rssm._ensemble_out_layers.\1.img_out_head_\1."),
    (r"rssm\.posterior_hidden\.", "rssm._obs_out.0."),
    (r"rssm\.posterior_out\.", "rssm._obs_out.obs_out_head."),
    (r"\blayers\.(\d+)\.", r"_mlp_nn.dense_\1."),
    (r"\.std_out\.", "._out_dist._std_nn."),
    (r"\.out\.", "._out_dist._out_nn."),
]
# ContextWM's release -> PreLAR's. No name of the latter fits.
CONTEXTWM = [
    (r"^wm\.encoder\.cond_convin\.", "wm.encoder._deco_net.convin.0."),
    (r"^wm\.encoder\.cond_(res\d+\.)", r"wm.encoder._deco_net.\1"),
    (r"^wm\.encoder\.(convin\.|res\d+\.)", r"wm.encoder._cnn_net.\1"),
    (r"^wm\.encoder\.(conv\d+\.)", r"wm.encoder._cnn_nn.\1"),
    (r"^wm\.heads\.decoder\.convin\.(?=weight|bias)", "wm.heads.decoder.convin.0."),
    (r"^wm\.heads\.decoder\.(res\d+\.|conv\d+\.)", r"wm.heads.decoder._cnn_nn.\1"),
    (r"rssm\.img_in\.", "rssm._img_in.0."),
    (r"rssm\.img_out_(\d+)\.", r"rssm._ensemble_out_layers.\1.img_out_\1."),
    (r"rssm\.img_dist_(\d+)\.", r"rssm._ensemble_out_layers.\1.img_out_head_\1."),
    (r"rssm\.obs_out\.", "rssm._obs_out.0."),
    (r"rssm\.obs_dist\.", "rssm._obs_out.obs_out_head."),
    (r"\.dense(\d+)\.", r"._mlp_nn.dense_\1."),
    (r"\.out\.(out|std)\.(?=weight|bias)", r"._out_dist._\1_nn."),
]
# Theirs are made during the first forward pass and may be missing; they start from zero.
OPTIONAL = re.compile(r"(q_pos_emb|kv_pos_emb|num_batches_tracked|intr_rewnorm\.mag)$")
OURS_ONLY = "video_bonus.filled"


def official_name(name: str, action_window: int = 1) -> str:
    """The authors' name of one of our tensors (``world_model.`` in front is ignored)."""
    name = name.removeprefix("world_model.")
    if name.startswith("action_encoder."):
        hidden, out = (0, 2) if action_window == 1 else (1, 4)
        name = name.replace("action_encoder.hidden.", f"wm.action_encoder._encoder.{hidden}.")
        return name.replace("action_encoder.out.", f"wm.action_encoder._encoder.{out}.")
    for pattern, replacement in COMPONENTS:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    for pattern, replacement in INSIDE:
        name = re.sub(pattern, replacement, name)
    return name


def read_official(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, by their names in PreLAR's ``variables.pt``.

    Raises:
        FileNotFoundError: the folder holds none of the files.
        ValueError: a file is damaged, or holds anything but tensors.
    """
    folder = Path(folder)
    whole = folder / "variables.pt"
    if whole.exists():
        return {_prelar_name(key): x for key, x in _read(whole).items()}
    state: dict[str, Tensor] = {}
    for file, prefix in PARTS.items():
        if (folder / file).exists():
            state |= {_prelar_name(prefix + key): x for key, x in _read(folder / file).items()}
    if not state:
        raise FileNotFoundError(
            f"{folder} holds no official checkpoint; expected variables.pt or {', '.join(PARTS)}"
        )
    return state


def _prelar_name(name: str) -> str:
    """PreLAR's name of a tensor of either release."""
    for pattern, replacement in CONTEXTWM:
        name = re.sub(pattern, replacement, name)
    return name


def official_action_dim(folder: str | Path) -> int:
    """Size of the real action that an agent's checkpoint was trained with.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_official`; or the folder holds no actor.
    """
    actor = official_name("actor.std_out.weight")
    state = read_official(folder)
    if actor not in state:
        raise ValueError(f"{folder} holds no actor ({actor}): it is no fine-tuning checkpoint")
    return state[actor].shape[0]


def load_official_checkpoint(folder: str | Path, model: nn.Module) -> None:
    """Load the authors' weights into a world model or an :class:`Agent`.

    Args:
        folder: the checkpoint folder.
        model: a model of the same system, phase and size.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_official`; also a tensor that is missing or
            has another shape, by its official name. Nothing is loaded then.
    """
    theirs = read_official(folder)
    own, window = model.state_dict(), _action_window(model)
    loaded, problems = {}, []
    for name, tensor in own.items():
        official = official_name(name, window)
        if official in theirs and theirs[official].shape == tensor.shape:
            loaded[name] = theirs[official].to(tensor.dtype)
        elif official in theirs:
            shape = tuple(theirs[official].shape)
            problems.append(f"{official} is {shape} there and {tuple(tensor.shape)} here")
        elif not OPTIONAL.search(official) and name != OURS_ONLY:
            problems.append(f"{official} is missing there")
    if problems:
        raise ValueError(
            f"{folder} does not fit this model: {len(problems)} tensors differ "
            f"({'; '.join(problems[:3])})"
        )
    model.load_state_dict(loaded, strict=False)
    if isinstance(model, Agent) and model.video_bonus is not None:  # the count is not saved there
        bonus = model.video_bonus
        bonus.filled.copy_(bonus.memory.abs().sum(1).count_nonzero())


def save_official_checkpoint(folder: str | Path, model: nn.Module) -> None:
    """Write a world model or an :class:`Agent` as the authors' code expects it.

    ``variables.pt`` and the part files of what the model has; aliases that their agents carry
    (``wm.af_rssm``, ``_expl_behavior``) are included.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    window = _action_window(model)
    state = {
        official_name(name, window): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != OURS_ONLY
    }
    for file, prefix in PARTS.items():
        part = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
        if part:
            _write(part, folder / file)
    if isinstance(model, Agent):  # of their reward normalizer, which never moves
        state["_task_behavior.rewnorm.mag"] = torch.ones((), dtype=torch.float64)
    aliases = {"_task_behavior.": "_expl_behavior."}
    if not any(key.startswith("wm.af_rssm.") for key in state):
        aliases["wm.rssm."] = "wm.af_rssm."
    for prefix, alias in aliases.items():
        state |= {alias + k[len(prefix) :]: x for k, x in state.items() if k.startswith(prefix)}
    _write(state, folder / "variables.pt")


def _write(state: dict[str, Tensor], path: Path) -> None:
    with atomic_write(path) as part:
        torch.save(state, part)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = read_tensors(path)
    except DamagedFileError as error:
        raise ValueError(
            f"{path} is not a readable file of weights ({error}); copy it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} holds something other than named tensors; it is not a state dict")
    return dict(state)


def _action_window(model: nn.Module) -> int:
    return getattr(getattr(model, "world_model", model), "action_window", 1)
