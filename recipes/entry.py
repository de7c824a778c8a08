"""The command line of every recipe: a checked configuration in, one line out when it is wrong."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast
from unittest import mock

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.recipes.command_line import as_typed
from prelar_trl.recipes.schema import RunConfig, register
from prelar_trl.utils import STOPPED, listed, one_line

FULL_ERROR = "HYDRA_FULL_ERROR"
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, under Windows

register()


class Stopped(SystemExit):
    """A run that was asked to stop, and that the same command continues.

    Exit codes are those that schedulers know: 0 done, 1 failed, 75 stopped: start it again.
    """

    code = STOPPED


def start(name: str) -> None:
    """Start a recipe with the configuration ``configs/<name>.yaml`` and the command line.

    Its module, and torch with it, is imported once the configuration is checked; its
    ``main(config)`` does the work. Expected errors, those on the command line too, end the program
    with one line on stderr. With ``HYDRA_FULL_ERROR=1`` in the environment they show where they
    came from.
    """
    full = os.environ.get(FULL_ERROR) == "1"

    def job(config: DictConfig) -> None:
        with one_line_errors(full), mock.patch.dict(os.environ):
            if not full:  # a program that is started from here decides anew
                os.environ.pop(FULL_ERROR, None)
            cfg = settings(config)
            if isinstance(cfg, RunConfig) and is_cpu(cfg.device):
                with_tcmalloc()  # starts the program anew: before the imports, not after them
            with stoppable() if isinstance(cfg, RunConfig) else nullcontext():
                importlib.import_module(f"prelar_trl.recipes.{name}").main(cfg)

    job.__module__ = f"prelar_trl.recipes.{name}"  # Hydra names the job by it
    run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(job)
    # Hydra raises its own errors then, instead of printing them on many lines.
    with one_line_errors(full), mock.patch.dict(os.environ, {FULL_ERROR: "1"}):
        with mock.patch.object(sys, "argv", [sys.argv[0], *typed(name)]):
            run()


def main() -> None:
    """Entry point of the programs ``prelar-<recipe>``."""
    start(Path(sys.argv[0]).stem.removeprefix("prelar-").replace("-", "_"))


def is_cpu(device: str) -> bool:
    """Whether a device is the CPU for sure, without torch."""
    return device == "cpu" or (device == "auto" and not any(map(os.path.exists, GPUS)))


def typed(recipe: str) -> list[str]:
    """The arguments of the command line, text as it was typed; see `as_typed`."""
    node = ConfigStore.instance().load(f"{recipe}_schema.yaml").node
    groups = [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()]
    return as_typed(sys.argv[1:], cast(type, OmegaConf.get_type(node)), groups)


@contextmanager
def one_line_errors(full: bool) -> Iterator[None]:
    """Expected errors end the program with one line, unless ``full``."""
    try:
        yield
    except Stopped as stopped:
        with suppress(OSError):  # a terminal that is gone
            print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is kept", file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as error:
        line = describe(error)
        if full or line is None:
            raise
        sys.exit(f"error: {line}")


@contextmanager
def stoppable() -> Iterator[None]:
    """What asks a run to stop ends it; once it has begun, it listens itself and saves first."""

    def stop(*_: object) -> None:
        raise Stopped("stopped while it was starting; the same command with resume=auto goes on")

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    asked = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(error: Exception) -> str | None:
    """An expected error in one line; None for an unexpected one."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        return f"{group}={name} is unknown; choose {listed(error.options)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given: add {error.full_key}=<value>"
    if isinstance(error, HydraException | OmegaConfBaseException):
        lines = [*str(error).splitlines(), *str(error.__cause__ or "").splitlines()]
        said = [line for line in lines if line and not line.startswith((" ", "To append", "See "))]
        text = ": ".join(line.removesuffix(".") for line in said)
        return f"{text.removeprefix('Error merging override ')} (--cfg job shows all keys)"
    if isinstance(error, OSError | ValueError | ImportError):
        return one_line(error)
    if isinstance(error, RuntimeError) and "\n" not in str(error):
        return str(error)
    return None


def settings(config: DictConfig) -> Any:
    """The configuration as its dataclass.

    Raises:
        ValueError: a key that the dataclass does not have, added with ``+``, or a bad value.
        MissingMandatoryValue: a value that must be given is not.
    """
    cfg: Any = cast(Any, OmegaConf.to_object(config))
    unknown = config.keys() - {field.name for field in fields(cfg)}
    if unknown:
        raise ValueError(f"unknown config key {min(map(str, unknown))}: --cfg job shows all keys")
    return cfg
