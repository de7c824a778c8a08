"""Models to hand on: a folder with weights, configuration and card, also on the Hugging Face hub.

``model.safetensors`` holds the weights, ``config.json`` what builds the model and how it was
trained, ``README.md`` the card. Reading runs no code of the folder's, unless it is trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from prelar_trl.config import named_modules
from prelar_trl.models import Agent, make_model
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.pretrained import load_weights
from prelar_trl.utils import atomic_write, one_line, sha256

__all__ = ["is_export", "load_pretrained", "push", "read_export", "write_export"]

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# Of a checkpoint: what builds its model, and how far it was trained.
FACTS = ("phase", "method", "size", "overrides", "inputs", "action_dim", "discrete", "step")
TYPES = {"format": int, "phase": str, "method": str, "size": str}  # of what CONFIG must hold
TYPES |= {"overrides": dict, "inputs": dict, "training": dict}
STATE = {"pretrain": "model", "finetune": "agent"}  # where a checkpoint keeps the weights
HUB = "hf://"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pretrained(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_code: bool = False
) -> RSSMWorldModel | Agent:
    """The model of an exported folder, in evaluation mode on the CPU.

    Args:
        name: the folder, or an id on the Hugging Face hub, ``owner/name`` or
            ``hf://owner/name``.
        revision: of the hub: a branch, tag or commit. Default: ``main``.
        trust_code: its latent actions may be made by a module that the folder names, whose import
            runs code. Default: False.

    Returns:
        The world model of a pre-training run, or the agent of a fine-tuning run.

    Raises:
        FileNotFoundError: neither a folder nor a hub id.
        ImportError: safetensors, or huggingface_hub for an id, is not installed.
        ValueError: damage, a newer format, weights that do not fit, or code that is not trusted.
    """
    state = read_export(name, revision=revision, trust_code=trust_code)
    try:
        model = make_model(state)
        load_weights(model, state[STATE[state["phase"]]], str(name))
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {one_line(error)}") from None
    return model.eval()


def is_export(name: str | os.PathLike[str]) -> bool:
    """Whether it is an exported folder, or names one on the hub by ``hf://owner/name``."""
    return str(name).startswith(HUB) or (Path(name).expanduser() / CONFIG).is_file()


def write_export(
    folder: str | os.PathLike[str],
    checkpoint: Mapping[str, Any],
    training: Mapping[str, Any],
    card: str,
) -> Path:
    """Write the model of a checkpoint, without its optimizers.

    Args:
        folder: the new folder.
        checkpoint: of a pre-training or fine-tuning run.
        training: how it was trained, for readers; plain values.
        card: Markdown.

    Raises:
        FileExistsError: the folder holds something.
        ImportError: safetensors is not installed.
    """
    save_file = _import("safetensors.torch").save_file
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: choose another folder")
    weights: dict[str, Tensor] = checkpoint[STATE[checkpoint["phase"]]]
    config = {"format": FORMAT, "library": "prelar_trl"}
    config |= {name: checkpoint[name] for name in FACTS if name in checkpoint}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as part:  # whole or not at all
        part.mkdir()
        whole = {name: x.detach().cpu().contiguous().clone() for name, x in weights.items()}
        save_file(whole, part / WEIGHTS, metadata={"format": "pt"})
        (part / WEIGHTS).chmod(0o644)  # it makes a file for its owner alone
        config["sha256"] = sha256(part / WEIGHTS)
        config["training"] = dict(training)
        config["config_sha256"] = _config_sha256(config)
        text = json.dumps(config, indent=2)
        (part / CONFIG).write_text(text + "\n", encoding="utf-8")
        (part / CARD).write_text(card, encoding="utf-8")
    return folder


def read_export(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_code: bool = False,
    typed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An export in the form of a checkpoint; see :func:`load_pretrained`.

    A module that the caller names itself, in the settings ``typed`` of the model, needs no trust.
    """
    load_file = _import("safetensors.torch").load_file
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _pull(str(name).removeprefix(HUB), revision)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        given = {"inputs": {}, **config}  # older ones have none
        for key, kind in TYPES.items():
            if not isinstance(given[key], kind):
                raise TypeError(f"{key} is {given[key]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is no exported model: {CONFIG}: {error!r}") from None
    if config["format"] > FORMAT or config["phase"] not in STATE:
        about = f"format {config['format']}, phase {config['phase']}"
        raise ValueError(f"{name} has {about}: update the package")
    for setting, kind in named_modules(config["overrides"]).items():
        if not trust_code and kind != (typed or {}).get(setting):
            raise ValueError(
                f"{name} has {setting}={kind}, which runs the code of that module: if you trust "
                "it, add trust_code=true"
            )
    if config.get("config_sha256") not in (None, _config_sha256(config)):  # older ones have none
        raise ValueError(
            f"{name} is damaged: the checksum of {CONFIG} differs (if you have changed it, remove "
            "config_sha256)"
        )
    file = folder / WEIGHTS
    if file.is_file() and config.get("sha256") not in (None, sha256(file)):  # safetensors has none
        raise ValueError(f"{name} is no exported model: {WEIGHTS}: its checksum differs")
    try:
        weights = load_file(file)
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"{name} is no exported model: {WEIGHTS}: {error}") from None
    return {**config, STATE[config["phase"]]: weights}


def push(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Put an exported folder on the Hugging Face hub; returns its address.

    Args:
        folder: written by :func:`write_export`.
        repository: ``owner/name``; made if it is not there.
        private: make it so. Default: False.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: no exported folder.
        OSError: the hub refuses, or cannot be reached.
    """
    hub = _import("huggingface_hub")
    folder = Path(folder).expanduser()
    if not folder.is_dir() or not is_export(folder):
        raise ValueError(f"{folder} is no exported model")
    api = hub.HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    files = [CONFIG, WEIGHTS, CARD]
    api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)
    return str(address)


def _pull(repository: str, revision: str | None) -> Path:
    """The folder of the local cache that holds a repository of the hub, loaded if it is not."""
    if HUB_ID.fullmatch(repository) is None:
        raise FileNotFoundError(f"{repository} is neither a folder nor a hub id (owner/name)")
    hub = _import("huggingface_hub")
    files = [CONFIG, WEIGHTS, CARD]
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # of many kinds: no such repository, no network, no cache
        text = str(error).splitlines()[0]
        raise FileNotFoundError(f"{repository} is no folder, and not on the hub: {text}") from None


def _config_sha256(config: Mapping[str, Any]) -> str:
    """Of all that it holds beside this checksum, in any order."""
    content = {name: value for name, value in config.items() if name != "config_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _import(name: str) -> ModuleType:
    """An optional package.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(f"{package} is missing: pip install 'prelar_trl[hub]'") from None
