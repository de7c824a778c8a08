"""Environments for the recipes, from make_env or from any function that makes one."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
from torchrl.data import OneHot
from torchrl.envs import EnvBase

from prelar_trl.envs import import_factory, is_import_path, make_env
from prelar_trl.envs.make import checked
from prelar_trl.types import Inputs

KEYS = {"pixels", "is_first", "success", "step_count", "episode_reward"}


def build_env(env_factory: Callable[..., Any], name: str | None, **options: Any) -> EnvBase:
    """Call a factory and give what it makes the form of :func:`prelar_trl.envs.make_env`.

    A factory whose first argument has no default is called as make_env is: with the name and the
    options that it takes. Any other, such as ``lambda: MyEnv()``, ``MyEnv`` or
    ``partial(make_env, "toy")``, gets those of the options that are set and that it names. What it
    does not take (``action_repeat``, ``max_steps``, ``num_workers``, ...) make_env does.

    Args:
        env_factory: gives an environment of TorchRL or gymnasium.
        name: the ``env`` of the configuration. With make_env as the factory it may be
            ``<module>:<callable>``, which then is the factory; modules in the working directory are
            found.
        **options: make_env's; ``seed`` and ``num_workers`` among them.

    Raises:
        ValueError: see make_env; or the factory needs an argument that no option is.
    """
    if env_factory is make_env and name is not None and is_import_path(name):
        if os.getcwd() not in sys.path:  # a program looks beside its own file only
            sys.path.append(os.getcwd())
        env_factory = import_factory(name)
    if isinstance(env_factory, EnvBase | gymnasium.Env) or not callable(env_factory):
        kind = type(env_factory).__name__
        raise ValueError(
            "env_factory must be a function that makes an environment, such as lambda: MyEnv(), "
            f"got {kind}: training and evaluation each need one of their own"
        )
    parameters = _parameters(env_factory)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    first = parameters[0] if parameters else None
    takes_name = (
        first is not None
        and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
        and first.default is first.empty
        and first.name not in options
    )
    if takes_name:
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = {key: x for key, x in options.items() if anything or key in named}
        make = partial(env_factory, name, **taken)
    else:
        required = {p.name for p in parameters if p.default is p.empty and p.name in named}
        taken = {
            key: x
            for key, x in options.items()
            if key in named and (x is not None or key in required)
        }
        if unknown := required - options.keys():
            raise ValueError(
                f"env={name}: the function asks for {', '.join(sorted(unknown))}; it can get the "
                f"name, as its first argument, and {', '.join(options)}"
            )
        make = partial(env_factory, **taken)
    left = {key: x for key, x in options.items() if key not in taken and x is not None}
    given = {key: options[key] for key in ("seed", "pixels") if key in options} | left
    if "num_workers" not in taken:
        return make_env(make, **given)
    for key in ("worker_timeout", "worker_failures"):  # it makes the processes itself
        left.pop(key, None)
        given.pop(key, None)
    env = make()
    if not left and isinstance(env, EnvBase) and KEYS <= {*env.observation_spec.keys()}:
        return checked(env, f"environment {name}")
    return make_env(env, **given)


def interface(env: EnvBase) -> dict[str, Any]:
    """What an agent must know of its environment, as make_agent takes it; part of a checkpoint."""
    spec, seen = env.action_spec, env.observation_spec
    inputs = Inputs(
        size=seen["pixels"].shape[-1],
        views=seen["pixels"].shape[-3] // 3,
        vector=seen["vector"].shape[-1] if "vector" in seen.keys() else 0,
    )
    return {"action_dim": spec.shape[-1], "discrete": isinstance(spec, OneHot), "inputs": inputs}


def saved_interface(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The interface of the environment that a checkpoint's agent was trained in."""
    return {
        "action_dim": checkpoint["action_dim"],
        "discrete": checkpoint.get("discrete", False),
        "inputs": Inputs(**checkpoint.get("inputs", {})),
    }


def check_interface(
    env: str, known: Mapping[str, Any], run: str, trained: Mapping[str, Any]
) -> None:
    """Raise ValueError where an agent cannot act in an environment."""
    has, had = (
        f"{x['action_dim']} {'choices of action' if x['discrete'] else 'action dimensions'}"
        for x in (known, trained)
    )
    if has != had:
        raise ValueError(f"env={env} has {has}, the agent in {run} has {had}")
    if known["inputs"] != trained["inputs"]:
        raise ValueError(
            f"env={env} gives {known['inputs']}, the agent in {run} sees {trained['inputs']}"
        )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """A class's are those of its constructor: TorchRL's metaclass hides them."""
    if inspect.isclass(function):
        return list(inspect.signature(function.__init__).parameters.values())[1:]
    return list(inspect.signature(function).parameters.values())
