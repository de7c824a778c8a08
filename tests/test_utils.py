from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from prelar_trl.utils import atomic_write, check_choice, dotted, map_ahead, read_json


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    file = tmp_path / "a.json"
    with atomic_write(file, sync=True) as part:
        part.write_text("old")
    with pytest.raises(KeyError), atomic_write(file) as part:
        part.write_text("ne")
        assert file.read_text() == "old" and part.suffix == ".json"
        raise KeyError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    with atomic_write(tmp_path / "done") as part:
        part.mkdir()
        (part / "x").touch()
    with pytest.raises(KeyError), atomic_write(tmp_path / "failed") as part:
        part.mkdir()
        (part / "x").touch()
        raise KeyError
    assert [x.name for x in tmp_path.iterdir()] == ["done"]


def test_an_unknown_value_names_the_choices() -> None:
    check_choice("mode", "soft", ("soft", "sign"))
    with pytest.raises(ValueError, match="^mode=1 is unknown; choose a, b or c$"):
        check_choice("mode", 1, "abc")
    with pytest.raises(ValueError, match="choose a$"):
        check_choice("mode", 1, "a")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": \xff}', b"[" * 100_000, b"nan"])
def test_damaged_json_is_named(content: bytes, tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json is damaged: ") as error:
        read_json(file)
    assert "\n" not in str(error.value)
    file.unlink()
    assert read_json(file, missing_ok=True) == {}
    with pytest.raises(FileNotFoundError):
        read_json(file)


def test_a_pool_gives_results_in_order_and_runs_ahead_of_them_by_so_many() -> None:
    items = iter(range(20))
    with ThreadPoolExecutor(2) as pool:
        for taken, result in enumerate(map_ahead(pool, str, items, 3)):
            assert result == str(taken)
            assert items.__length_hint__() == max(0, 20 - (taken + 3))
    assert taken == 19


def test_nested_settings_have_dotted_keys_of_any_kind() -> None:
    assert dotted({"a": 1, "b": {"c": {}, 2: {"d": [3]}}}) == {"a": 1, "b.2.d": [3]}
