"""Where the programs of a sweep run: processes of this machine, jobs of SLURM, actors of Ray."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Protocol

from prelar_trl.checkpoint_files import LAST, has_checkpoint
from prelar_trl.utils import STOPPED, one_line

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
SAVE_S = 60  # seconds that a program gets to save when its SLURM job must end


@dataclass
class Program:
    """A command that goes on at its last checkpoint wherever and whenever it is called.

    Args:
        command: without ``resume``.
        folder: its run.
        root: where it runs; paths in the command are relative to it.
        log: gets what it prints.
        environment: beside that of the caller.
        resumes: it takes ``resume=``. False for one that goes on by itself.
    """

    command: list[str]
    folder: Path
    root: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = True
    process: subprocess.Popen | None = field(default=None, init=False)  # of poll()

    @property
    def has_checkpoint(self) -> bool:
        return has_checkpoint(self.folder / "checkpoints" / LAST)

    def start(self, lock: IO | None = None) -> subprocess.Popen:
        """Start it, holding ``lock`` open; a folder without any checkpoint is made anew."""
        command, resume = list(self.command), self.has_checkpoint
        if self.resumes:
            command.append(f"resume={'true' if resume else 'auto'}")
            if not resume and not any(self.folder.glob("checkpoints/*_*.pt")):
                shutil.rmtree(self.folder, ignore_errors=True)  # it may be of other settings
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a" if resume else "w", encoding="utf-8") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[] if lock is None else [lock.fileno()],
                preexec_fn=_as_child,
            )

    def poll(self) -> int | None:
        """Its exit code, None while it runs; started when first asked after, as by Ray's actor."""
        self.process = self.process or self.start()
        return self.process.poll()

    def terminate(self) -> None:
        """Tell it to save and stop."""
        if self.process is not None:
            self.process.terminate()

    def __call__(self) -> int:
        """Run it to its end and return its exit code; what a SLURM job does."""
        while (code := self.poll()) is None:  # wait() would block checkpoint() below
            time.sleep(0.5)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit when the job is preempted or out of time: save, then once more."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415  only there within a job

        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(SAVE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its last checkpoint counts
        self.process = None  # it is started anew
        return DelayedSubmission(self)


def _as_child() -> None:
    """In a child: be killed when the parent is (on Linux); leave SLURM's signal to the parent."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Handle(Protocol):
    """A program that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def terminate(self) -> None:
        """Tell it to save and stop."""


class Launcher(Protocol):
    """Starts programs.

    ``detached``: they go on when the sweep's own process ends, and the next one attaches to them.
    """

    detached: bool = False

    def start(self, program: Program, name: str) -> tuple[Handle, dict[str, Any]]:
        """The started program, and what :meth:`attach` needs of it."""
        ...

    def attach(self, record: Mapping[str, Any]) -> Handle | None:
        """A program that an earlier process started, if it can still be asked after."""
        return None


@dataclass
class LocalLauncher(Launcher):
    """Processes of this machine, which end with the sweep and hold its open file until then."""

    lock: IO

    def start(self, program: Program, name: str) -> tuple[Handle, dict[str, Any]]:
        return program.start(self.lock), {}


class SlurmLauncher(Launcher):
    """Jobs of a SLURM cluster, through ``submitit``.

    A job that is preempted or out of time saves and is put in the queue again, and goes on at its
    checkpoint, also while the sweep's own process is not there.

    Args:
        folder: for scripts and results of the jobs, seen by all machines.
        options: of ``submitit.AutoExecutor.update_parameters``: ``timeout_min``,
            ``gpus_per_node``, ``cpus_per_task``, ``mem_gb``, ``slurm_partition``, ...

    Raises:
        ImportError: submitit is not installed.
        ValueError: an option that it does not know.
    """

    detached = True

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import submitit  # noqa: PLC0415  optional
        except ImportError:
            raise ImportError(
                "launcher=slurm needs submitit: pip install 'prelar_trl[slurm]'"
            ) from None
        self.folder, self.job_type = folder, submitit.SlurmJob
        self.executor = submitit.AutoExecutor(
            folder, cluster="slurm", slurm_max_num_timeout=1_000_000
        )
        try:
            self.executor.update_parameters(**options)
        except (NameError, TypeError) as error:
            raise ValueError(f"slurm: {one_line(error)}") from None

    def start(self, program: Program, name: str) -> tuple[Handle, dict[str, Any]]:
        self.executor.update_parameters(name=name)
        job = self.executor.submit(program)
        return SlurmHandle(job), {"slurm_job": job.job_id}

    def attach(self, record: Mapping[str, Any]) -> Handle | None:
        if "slurm_job" not in record:
            return None
        return SlurmHandle(self.job_type(self.folder, record["slurm_job"]))


@dataclass
class SlurmHandle:
    """A job of a SLURM cluster."""

    job: Any

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        if self.job.exception() is not None:  # killed by the cluster: node, memory, scancel
            return 1
        return self.job.result()

    def terminate(self) -> None:
        self.job.cancel()


class RayLauncher(Launcher):
    """Programs on the machines of a Ray cluster, which end with the sweep.

    The machines need the same folders and Python packages. A program whose machine is lost counts
    as stopped; the next sweep goes on with it.

    Args:
        options: ``address`` of the cluster, ``auto`` or ``ray://...``, as ``ray.init`` takes it;
            without one a Ray is started on this machine. The others are an actor's: ``num_cpus``,
            ``num_gpus``, ``memory``, ``resources``, ...

    Raises:
        ImportError: Ray is not installed.
        ValueError: an option that it does not know, or no cluster at that address.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            ray = importlib.import_module("ray")  # optional
        except ImportError:
            raise ImportError("launcher=ray needs Ray: pip install 'prelar_trl[ray]'") from None
        actor = dict(options)
        address = actor.pop("address", None)
        try:
            self.actor = ray.remote(Program).options(**actor)
            ray.init(address, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, TypeError, ValueError) as error:
            raise ValueError(f"ray: {one_line(error)}") from None
        self.ray = ray

    def start(self, program: Program, name: str) -> tuple[Handle, dict[str, Any]]:
        given = {x.name: getattr(program, x.name) for x in fields(program) if x.init}
        return RayHandle(self.ray, self.actor.remote(**given)), {}


class RayHandle:
    """An actor that runs a program."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor
        self.answer = actor.poll.remote()

    def poll(self) -> int | None:
        if not self.ray.wait([self.answer], timeout=0)[0]:  # it waits for a free machine
            return None
        try:
            code = self.ray.get(self.answer)
        except self.ray.exceptions.RayActorError:  # its machine is lost
            return STOPPED
        except self.ray.exceptions.RayTaskError:  # it cannot be started there
            return 1
        if code is None:
            self.answer = self.actor.poll.remote()
        else:
            self.ray.kill(self.actor)  # frees what it has taken
        return code

    def terminate(self) -> None:
        self.actor.terminate.remote()
