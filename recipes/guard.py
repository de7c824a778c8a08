"""What a recipe does about updates that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensordict import TensorDictBase
from torch import Tensor

from prelar_trl.checkpoint import rng_state, save_checkpoint
from prelar_trl.record import RunFolder
from prelar_trl.updates import Update


class UpdateGuard:
    """Counts the updates that were skipped, and stops the run after too many in a row.

    What went into the last one, and the state of the random generators before it, is written to
    ``not_finite.pt`` in the run folder; :func:`prelar_trl.checkpoint.load_checkpoint` reads it.

    Args:
        run: the run's folder.
        updates: what is trained; they skip by themselves what is not finite.
        most: so many in a row are too many.
        rank: of this process; the file of another one than the first is ``not_finite-<rank>.pt``.
    """

    def __init__(self, run: RunFolder, updates: Sequence[Update], most: int, rank: int = 0) -> None:
        self.file = run.path / (f"not_finite-{rank}.pt" if rank else "not_finite.pt")
        self.updates, self.most = updates, most
        self.on_cpu = not next(updates[0].module.parameters()).is_cuda
        self.skipped = self._count()  # as of the last look
        self._checks = 0
        self._batches: Sequence[TensorDictBase] = ()
        self._rng = rng_state()

    def watch(self, *batches: TensorDictBase) -> None:
        """Before an update: note what goes into it."""
        self._batches, self._rng = batches, rng_state()

    def check(
        self, losses: TensorDictBase | Mapping[str, Tensor], step: int, *, last: bool = False
    ) -> None:
        """After the update at ``step`` of the run: count what was skipped.

        Raises:
            RuntimeError: too many in a row; one is, if no update follows: ``last``.
        """
        self._checks += 1  # a GPU is not waited for at each update
        if not (self.on_cpu or last or self._checks % self.most == 0):
            return
        self.skipped = self._count()
        worst = max(self.updates, key=lambda update: int(update.skipped_in_a_row))
        in_a_row = int(worst.skipped_in_a_row)
        if in_a_row < (1 if last else self.most):
            return
        batches = [batch.cpu().to_dict() for batch in self._batches]
        state = {"step": step, "rng": self._rng, "batches": batches}
        save_checkpoint(self.file, state, finite=False)
        # A term of the loss, if one is to blame, else the gradient's norm.
        names = sorted(losses.keys(), key=lambda name: not name.startswith("loss_"))
        bad = [name for name in names if not losses[name].isfinite().all()]
        reason = f"{bad[0]} is {losses[bad[0]].item()}" if bad else "the loss is not finite"
        raise RuntimeError(
            f"{reason} at step {step}, and the last {in_a_row} updates were skipped: training has "
            f"diverged; the checkpoint saved before is kept, and {self.file} holds the batch and "
            f"the random state. Start a new run with {worst.cure}"
        )

    def _count(self) -> int:
        return sum(int(update.skipped) for update in self.updates)

    def metrics(self) -> dict[str, int]:
        """What to log."""
        return {"skipped_updates": self.skipped}

    def shown(self) -> dict[str, int]:
        """What to show beside the progress: nothing as long as none was skipped."""
        return {"skipped": self.skipped} if self.skipped else {}
