"""The programs of a sweep: where they go on, and what they are given."""

from __future__ import annotations

from prelar_trl.sweep.launchers import Program


def test_a_program_goes_on_at_the_one_before_a_checkpoint_that_is_gone(tmp_path):
    before = tmp_path / "run" / "checkpoints" / "last_1.pt"
    before.parent.mkdir(parents=True)
    before.touch()
    program = Program(["echo"], tmp_path / "run", tmp_path, tmp_path / "run.log")
    assert program.start().wait() == 0
    assert (tmp_path / "run.log").read_text() == "resume=true\n" and before.is_file()
