"""Reading the parity fixtures: models, batches and random draws as in the official run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from prelar_trl.models import Agent, make_agent, make_world_model, make_world_model_loss
from prelar_trl.objectives import RSSMWorldModelLoss

FOLDER = Path(
    os.environ.get("PRELAR_PARITY_FIXTURES", Path(__file__).parent / "fixtures" / "parity")
)
VARIANTS = {"stoch": "gaussian", "deter": "deterministic", "mix": "mixed"}
FRAMES = {"concate": "concat", "diff": "diff", "flow": "flow", "catdiff": "catdiff"}


class Fixture:
    """One ``.npz`` of the official code, and the model that it describes."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, np.load(path, allow_pickle=False)
        self.meta = json.loads(str(self._file["meta"]))
        self.system, self.phase = self.meta["system"], self.meta["phase"]
        self.config: dict[str, Any] = self.meta["official_config"]

    def __contains__(self, key: str) -> bool:
        return key in self._file.files

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self._file[key]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All arrays under ``prefix/``, without it."""
        names = [name for name in self._file.files if name.startswith(prefix + "/")]
        return {name[len(prefix) + 1 :]: self[name] for name in names}

    def draws(self, kind: str) -> list[Tensor]:
        """The recorded random draws of one kind, in call order."""
        names = sorted(name for name in self._file.files if name.startswith("draws/"))
        return [self[name] for name in names if name.endswith("|" + kind)]

    def metrics(self) -> dict[str, float]:
        """What the official training step logged."""
        return json.loads(str(self._file["after_step/metrics"]))

    def batch(self) -> TensorDict:
        raw = self.group("batch")
        return TensorDict(
            {
                "pixels": raw["image"],
                "action": raw["action"],
                "reward": raw["reward"].unsqueeze(-1),
                "is_first": raw["is_first"].bool().unsqueeze(-1),
                "terminated": raw["is_terminal"].bool().unsqueeze(-1),
            },
            batch_size=raw["reward"].shape,
        )

    def overrides(self) -> dict[str, Any]:
        """Sizes and options, as fields of ModelSettings."""
        config, sizes = self.config, self.meta["sizes"]
        rssm = config.get("rssm", config.get("af_rssm"))
        options: dict[str, Any] = {
            "stoch": rssm["stoch"],
            "classes": rssm["discrete"] or 0,
            "deter": rssm["deter"],
            "hidden": rssm["hidden"],
            "ensemble": rssm["ensemble"],
            "depth": config["encoder"]["cnn_depth"],
            "stages": config["encoder"]["res_depth"],
            "layers": config["encoder"]["res_layers"],
            "norm": config["encoder"]["res_norm"],
            "head_units": sizes["units"],
            "latent_action_hidden": sizes["mlp_hidden"],
            "context_dropout": 0.0,
            "images": {"plaincnn": "cnn", "resnet": "resnet", "deco_resnet": "context"}[
                config["encoder_type"]
            ],
        }
        if "vanet" in config and self.phase == "pretrain" and self.system.startswith("prelar"):
            options |= self._code(config["vanet"], "latent_action")
            options["frames"] = FRAMES[config["vanet"]["va_method"]]
        if "action_encoder" in config and self.phase == "finetune":
            options |= self._code(config["action_encoder"], "action_code")
            options["action_window"] = config["action_encoder"]["twl"]
        if self.phase == "finetune":
            aux = config["loss_scales"].get("aux_reward", 0.0) != 0
            options["heads"] = (
                "reward",
                *(["discount"] if config["pred_discount"] else []),
                *(["aux_reward"] if aux else []),
            )
            options["grad_heads"] = (*(h for h in config["grad_heads"] if h != "decoder"),) + (
                ("aux_reward",) if aux else ()
            )
            options["discount"] = config["discount"]
            options["concat_embed"] = config.get("concat_embed", False)
            if config["beta"] == 0:
                options["bonus_embed"] = None
            else:
                options |= {
                    "bonus_neighbors": config["k"],
                    "bonus_memory": config["queue_size"],
                    "bonus_projection": config["queue_dim"],
                    "bonus_window": config["intr_seq_length"],
                }
        return options

    @staticmethod
    def _code(code: dict[str, Any], field: str) -> dict[str, Any]:
        variant = VARIANTS[code["type_"]]
        if variant == "gaussian" and code["discrete"]:
            variant = "categorical"
        return {
            field: variant,
            "latent_action_size": code["deter"] if variant == "deterministic" else code["stoch"],
            "latent_action_classes": 0 if variant == "deterministic" else code["discrete"],
            "latent_action_deter": code["deter"],
            "latent_action_options": {"prior_std": 1.2449187} if variant == "gaussian" else {},
        }

    def model(self) -> Any:
        """The world model (pre-training) or the agent, in modes, not yet loaded."""
        action_dim = self["batch/action"].shape[-1]
        make = make_agent if self.phase == "finetune" else make_world_model
        phase = () if self.phase == "finetune" else (self.phase,)
        model = make(self.system, *phase, action_dim=action_dim, sample=False, **self.overrides())
        return model

    def loss(self, model: Any) -> RSSMWorldModelLoss:
        config = self.config
        settings: dict[str, Any] = {
            "kl_balance": config["kl"]["balance"],
            "free_nats": config["kl"]["free"],
            "free_avg": config["kl"]["free_avg"],
            "consistency": "sign",
        }
        world_model, bonus = model, None
        weights: dict[str, float | None] = {}
        if isinstance(model, Agent):
            world_model, bonus = model.world_model, model.video_bonus
            settings["bonus_scale"] = config["beta"]
            for name in world_model.heads:
                weights[name] = config["loss_scales"].get(name, 1.0)
        for name in ("kl", "image", "af_kl"):
            if name in config["loss_scales"] and (name != "af_kl" or self._stacked(world_model)):
                weights[name] = config["loss_scales"][name]
        return make_world_model_loss(
            self.system, self.phase, world_model, video_bonus=bonus, weights=weights, **settings
        )

    @staticmethod
    def _stacked(world_model: Any) -> bool:
        return world_model.lower_rssm is not None


def fixtures() -> list[Path]:
    return sorted(FOLDER.glob("*.npz"))


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """||ours - theirs|| / (||theirs|| + floor); NaN never passes a comparison."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return float((ours - theirs).norm() / (theirs.norm() + floor + 1e-30))
