"""Files that appear whole or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from visadapt.core.files import replacing, serialise


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


def test_equal_content_is_equal_bytes(tmp_path):
    """Whatever the order of the entries, which the library's own writer shuffles."""
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "ä.scalar": torch.tensor(3)}
    metadata = {f"{i} \u00fc": f'"{i}" → \n' for i in range(9)}
    content = serialise(tensors, metadata)
    assert all(serialise(tensors, dict(reversed(metadata.items()))) == content for _ in range(5))
    assert serialise(tensors, metadata | {"0 \u00fc": "x"}) != content
    (tmp_path / "x.safetensors").write_bytes(content)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
        found = {key: file.get_tensor(key) for key in file.keys()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
