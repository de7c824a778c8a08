"""Updates that are not finite: skipped by the kernel as by the host."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from prelar_trl.fast import private, skip_on_device, skipping
from prelar_trl.updates import Update, WorldModelUpdate
from tests.tiny import batch, tiny


def trained(on_device: bool) -> dict[str, Tensor]:
    """Weights and optimizer after three updates, of which the second is not finite."""
    torch.manual_seed(0)
    _, loss = tiny("dreamerv2", "finetune")
    update = WorldModelUpdate(loss)
    if on_device:
        assert skip_on_device(update) is update
    for reward in (1.0, torch.nan, 1.0):
        data = batch()
        data["reward"][0, 1] = reward
        update(data)
    assert int(update.skipped) == 1
    tensors = dict(loss.state_dict())
    for number, moments in update.optimizers["model"].state_dict()["state"].items():
        tensors |= {f"{number}.{name}": x for name, x in moments.items()}
    return tensors


def test_the_kernel_skips_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(on_device=False)
    torch.testing.assert_close(trained(on_device=True), plain, rtol=0, atol=0)
    monkeypatch.setattr(skipping, "fused_adam_skips", lambda kind: False)
    torch.testing.assert_close(trained(on_device=True), plain, rtol=0, atol=0)


def test_nobody_asks_the_gpu_whether_an_update_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(flag: Tensor) -> bool:
        raise AssertionError("the host waits")

    plain, fast = (WorldModelUpdate(tiny("dreamerv2", "finetune")[1]) for _ in range(2))
    skip_on_device(fast)
    for update in (plain, fast):
        update.forward_backward(batch(), None)
    monkeypatch.setattr(Tensor, "__bool__", ask)
    fast.step_optimizers(torch.ones(()))
    with pytest.raises(AssertionError, match="the host waits"):
        plain.step_optimizers(torch.ones(()))


def test_of_another_optimizer_the_host_decides() -> None:
    update = skip_on_device(Update(nn.Linear(1, 1), "32", clip=1.0))
    update.optimizers["all"] = SGD(update.module.parameters(), lr=1.0)
    before = copy.deepcopy(update.module.state_dict())
    for loss, same in ((torch.nan, True), (1.0, False)):
        update.module(torch.ones(1)).sum().backward()
        update.step_optimizers(torch.tensor(loss))
        after = update.module.state_dict()
        assert all(torch.equal(x, after[name]) for name, x in before.items()) is same


def test_a_torch_whose_kernel_reads_no_flag_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(torch.optim.Adam):
        found_inf = property(lambda self: None)

    monkeypatch.setattr(torch.optim, "Adam", Changed)
    assert not private.fused_adam_skips.__wrapped__("cpu")
