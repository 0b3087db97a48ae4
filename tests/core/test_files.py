"""Files that appear whole or not at all."""

from __future__ import annotations

import pytest

from visadapt.core.files import replacing


def test_a_file_is_replaced_when_its_block_ends(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert temporary.parent == path.parent  # another file system could not rename it
        assert not path.exists()
    assert path.read_text() == "one"
    with replacing(str(path)) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_after_an_error_the_file_is_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
