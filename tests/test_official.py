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
from tests.toy_runs import different

OPTIONS = [{"action_window": 3}, {"ensemble": 2}, {"classes": 0}, {"norm": "layer"}, {"layers": 2}]
CASES = [(*case, {}) for case in PHASES] + [("prelar", "finetune", x) for x in OPTIONS]


def assert_loads(folder: Path, model: nn.Module, other: nn.Module) -> None:
    """The other model, whatever its weights were, is the first once it is loaded."""
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    load_official_checkpoint(folder, other)
    assert different(dict(model.state_dict()), dict(other.state_dict())) == []


@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_saved_and_loaded_is_the_same_model(method, phase, options, tmp_path: Path) -> None:
    model, loss = tiny(method, phase, **options)
    loss(batch())  # fills the bonus memory and the statistics of batch norm
    save_official_checkpoint(tmp_path, model)
    assert_loads(tmp_path, model, tiny(method, phase, **options)[0])
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
    model, other = (tiny_world_model(method) for _ in range(2))
    with pytest.raises(FileNotFoundError, match="variables.pt or rssm_variables.pt"):
        load_official_checkpoint(tmp_path, model)
    save_official_checkpoint(tmp_path, model)
    (tmp_path / "variables.pt").unlink()
    latent = method.startswith("prelar")
    assert {x.name for x in tmp_path.iterdir()} == set(list(PARTS)[: 4 if latent else 3])
    assert_loads(tmp_path, model, other)
    (tmp_path / "decoder_variables.pt").unlink()
    with pytest.raises(ValueError, match=r"wm\.heads\.decoder\.\S+ is missing there"):
        load_official_checkpoint(tmp_path, model)


def test_missing_tensors_and_other_shapes_are_errors_and_nothing_is_loaded(tmp_path: Path) -> None:
    save_official_checkpoint(tmp_path, tiny_world_model())
    state, model = torch.load(tmp_path / "variables.pt"), tiny_world_model()
    key = official_name("rssm.cell.linear.weight")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for changed, message in (
        ({k: x for k, x in state.items() if k != key}, rf"1 tensors differ \({key} is missing"),
        ({**state, key: torch.zeros(2, 3)}, rf"{key} is \(2, 3\) there and \(48, 32\)"),
    ):
        torch.save(changed, tmp_path / "variables.pt")
        with pytest.raises(ValueError, match=message):
            load_official_checkpoint(tmp_path, model)
    save_official_checkpoint(tmp_path, tiny_world_model("apv"))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_official_checkpoint(tmp_path, model)
    assert different(before, dict(model.state_dict())) == []


@pytest.mark.parametrize("data", [b"", b"hello", b"j1", b"\x80\x02X"], ids=str)
def test_damaged_files_give_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "variables.pt").write_bytes(data)
    with pytest.raises(ValueError, match="variables.pt is not a readable file of weights"):
        read_official(tmp_path)


@pytest.mark.parametrize("content", [[1], {"a": 1}, torch.zeros(2)], ids=str)
def test_files_of_code_or_anything_but_named_tensors_are_refused(content, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "variables.pt")
    with pytest.raises(ValueError, match="something other than named tensors"):
        read_official(tmp_path)
    torch.save({"wm.rssm": Malicious(tmp_path / "trace")}, tmp_path / "variables.pt")
    with pytest.raises(ValueError, match="is not a readable file of weights"):
        read_official(tmp_path)
    assert not (tmp_path / "trace").exists()
