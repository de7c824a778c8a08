"""The authors' weight layout: there and back, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prelar_trl.official import (
    PARTS,
    load_official_checkpoint,
    official_name,
    read_official,
    save_official_checkpoint,
)
from tests.test_checkpoint import Malicious
from tests.tiny import PHASES, batch, tiny, tiny_world_model


def scramble(model: nn.Module) -> None:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()


def assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_saved_and_loaded_is_the_same_model(method: str, phase: str, tmp_path: Path) -> None:
    model, loss = tiny(method, phase)
    loss(batch())  # fills the bonus memory and the statistics of batch norm
    save_official_checkpoint(tmp_path, model)
    other, _ = tiny(method, phase)
    scramble(other)
    load_official_checkpoint(tmp_path, other)
    assert_equal_states(model, other)


@pytest.mark.parametrize(
    "options",
    [{"action_window": 3}, {"ensemble": 2}, {"classes": 0}, {"norm": "layer"}, {"layers": 2}],
    ids=str,
)
def test_options_are_saved_and_loaded_too(options: dict, tmp_path: Path) -> None:
    model, _ = tiny("prelar", "finetune", **options)
    save_official_checkpoint(tmp_path, model)
    other, _ = tiny("prelar", "finetune", **options)
    scramble(other)
    load_official_checkpoint(tmp_path, other)
    assert_equal_states(model, other)


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_every_tensor_has_a_name_of_its_own(method: str, phase: str) -> None:
    model, _ = tiny(method, phase)
    names = [official_name(name) for name in model.state_dict() if name != "video_bonus.filled"]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("wm.", "_task_behavior.")) for name in names)


def test_an_agents_file_also_holds_what_only_the_authors_need(tmp_path: Path) -> None:
    model, _ = tiny("prelar", "finetune")
    save_official_checkpoint(tmp_path, model)
    state = read_official(tmp_path)
    for prefix, alias in (("wm.rssm.", "wm.af_rssm."), ("_task_behavior.", "_expl_behavior.")):
        keys = [key for key in state if key.startswith(prefix)]
        assert keys
        for key in keys:
            assert torch.equal(state[key], state[alias + key.removeprefix(prefix)])
    stacked, _ = tiny("apv", "finetune")
    save_official_checkpoint(tmp_path / "apv", stacked)
    state = read_official(tmp_path / "apv")
    weight = "_img_in.0.weight"
    assert not torch.equal(state[f"wm.rssm.{weight}"], state[f"wm.af_rssm.{weight}"])


@pytest.mark.parametrize("method", ["prelar", "apv", "contextwm", "prelar_no_al_cl"])
def test_a_pretraining_run_loads_from_its_part_files(method: str, tmp_path: Path) -> None:
    model, _ = tiny(method, "pretrain")
    save_official_checkpoint(tmp_path, model)
    (tmp_path / "variables.pt").unlink()
    latent = method.startswith("prelar")
    assert {x.name for x in tmp_path.iterdir()} == set(list(PARTS)[: 4 if latent else 3])
    other, _ = tiny(method, "pretrain")
    scramble(other)
    load_official_checkpoint(tmp_path, other)
    assert_equal_states(model, other)


def test_a_missing_part_file_is_told_by_its_tensors(tmp_path: Path) -> None:
    save_official_checkpoint(tmp_path, tiny_world_model())
    for name in ("variables.pt", "decoder_variables.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"wm\.heads\.decoder\.\S+ is missing there"):
        load_official_checkpoint(tmp_path, tiny_world_model())


def test_missing_tensors_and_other_shapes_are_errors_and_nothing_is_loaded(tmp_path: Path) -> None:
    save_official_checkpoint(tmp_path, tiny_world_model())
    state = torch.load(tmp_path / "variables.pt")
    key = official_name("rssm.cell.linear.weight")
    model = tiny_world_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for change, message in (
        (lambda s: s.pop(key), rf"1 tensors differ \({key} is missing there\)"),
        (lambda s: s.update({key: torch.zeros(2, 3)}), rf"{key} is \(2, 3\) there and \(48, 32\)"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "variables.pt")
        with pytest.raises(ValueError, match=message):
            load_official_checkpoint(tmp_path, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_checkpoint_of_another_method_does_not_fit(tmp_path: Path) -> None:
    save_official_checkpoint(tmp_path, tiny_world_model("apv", "pretrain"))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_official_checkpoint(tmp_path, tiny_world_model("prelar", "pretrain"))


def test_an_empty_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="variables.pt or rssm_variables.pt"):
        load_official_checkpoint(tmp_path, tiny_world_model())


@pytest.mark.parametrize("data", [b"", b"hello", b"j1", b"\x80\x02X"], ids=str)
def test_damaged_files_give_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "variables.pt").write_bytes(data)
    with pytest.raises(ValueError, match="variables.pt is not a readable file of weights"):
        read_official(tmp_path)


def test_files_with_code_are_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"wm.rssm": Malicious(trace)}, tmp_path / "variables.pt")
    with pytest.raises(ValueError, match="is not a readable file of weights"):
        read_official(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1], {"a": 1}, torch.zeros(2)], ids=str)
def test_files_of_anything_but_named_tensors_are_refused(content, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "variables.pt")
    with pytest.raises(ValueError, match="something other than named tensors"):
        read_official(tmp_path)
