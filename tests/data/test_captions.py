"""Captions: every layout that people have, and every mistake in one told by file."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.captioned_tasks import Words
from visadapt.data.captions import BadCaption, Captions, find_captions, too_long, warn_of_long


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def text(path, caption):
    path.write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def found(root, *args, **options):
    return {
        str(f.path.relative_to(root)): (f.caption, f.repeats) for f in find_captions(root, *args, **options)
    }  # fmt: skip


@pytest.fixture
def beside(tmp_path):
    for name in ("a.png", "b.jpg", "sub/c.d.png"):
        picture(tmp_path / name)
    text(tmp_path / "a.txt", "a red\n star ")
    text(tmp_path / "b.caption", "\ufeffzwei Gl\u00e4ser")
    text(tmp_path / "sub/c.d.txt", "three")
    return tmp_path


def test_text_files_beside_the_pictures(beside):
    want = {"a.png": ("a red star", 1), "b.jpg": ("zwei Gl\u00e4ser", 1), "sub/c.d.png": ("three", 1)}
    assert found(beside) == want
    text(beside / "b.txt", "two")  # .txt goes before .caption
    (beside / ".hidden").mkdir()
    picture(beside / ".hidden" / "x.png")
    picture(beside / "._a.png")
    picture(beside / "masks" / "a.png")
    assert found(beside, leave_out=[beside / "masks"]) == want | {"b.jpg": ("two", 1)}


def test_one_prompt_for_all(tmp_path):
    for name in ("a.png", "3_dog/b.png"):
        picture(tmp_path / name)
    assert found(tmp_path, " sks dog ") == {"a.png": ("sks dog", 1), "3_dog/b.png": ("sks dog", 3)}
    text(tmp_path / "README.txt", "not a caption")
    assert len(found(tmp_path, "sks dog")) == 2
    text(tmp_path / "a.txt", "another")
    with pytest.raises(BadCaption, match=r"data.instance_prompt: .* has captions, too \('a.txt'\)"):
        find_captions(tmp_path, "sks dog")
    with pytest.raises(BadCaption, match="data.instance_prompt is empty"):
        find_captions(tmp_path, "  ")


def test_repeat_folders(tmp_path):
    for name in ("10_sks dog/a.png", "10_sks dog/b.png", "2_a cat/c.png"):
        picture(tmp_path / name)
    text(tmp_path / "10_sks dog/b.txt", "sks dog on a lawn")
    assert found(tmp_path) == {
        "10_sks dog/a.png": ("sks dog", 10),
        "10_sks dog/b.png": ("sks dog on a lawn", 10),
        "2_a cat/c.png": ("a cat", 2),
    }
    picture(tmp_path / "d.png")
    with pytest.raises(BadCaption, match=r"picture '.*d.png' has no caption; write 'd.txt' beside it"):
        find_captions(tmp_path)
    (tmp_path / "d.png").unlink()
    picture(tmp_path / "0_none/e.png")
    with pytest.raises(BadCaption, match=r"e.png' is in a folder of 0 repeats"):
        find_captions(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path, kind):
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub/b.png")
    rows = [("a.png", 'one, "two"'), ("sub/b.png", "two"), ("a.png", "once more")]
    if kind == "jsonl":
        lines = "\n".join(json.dumps({"file_name": n, "words": w, "x": 1}) for n, w in rows)
    else:
        lines = "file_name,words\n" + "\n".join(f'{n},"{w.replace(chr(34), chr(34) * 2)}"' for n, w in rows)
    text(tmp_path / f"metadata.{kind}", lines + "\n\n")
    files = find_captions(tmp_path, column="words")
    assert [(str(f.path.relative_to(tmp_path)), f.caption) for f in files] == rows
    with pytest.raises(BadCaption, match=r"there is no 'text' among file_name, words.*; set data.caption_column"):
        find_captions(tmp_path)


def metadata(root, *rows, name="metadata.jsonl"):
    text(root / name, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


A = {"file_name": "a.png", "text": "one"}
BROKEN = {
    "missing file": ([A, {"file_name": "b.png", "text": "b"}], r"line 2: there is no picture 'b.png' in"),
    "empty": ([{"file_name": "a.png", "text": " "}], r"line 1: the caption of 'a.png' is empty"),
    "no name": ([{"text": "x"}], r"line 1: there is no 'file_name' among text"),
    "no json": ([A, "{oops"], r"metadata.jsonl', line 2: .*each line must be one JSON object"),
    "no object": ([A, "[1]"], r"line 2: \[1\] is no JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata(tmp_path, case):
    rows, message = BROKEN[case]
    picture(tmp_path / "a.png")
    metadata(tmp_path, *rows)
    with pytest.raises(BadCaption, match=message):
        find_captions(tmp_path)


def test_metadata_must_be_complete_and_one(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    metadata(tmp_path, A)
    with pytest.raises(BadCaption, match=r"picture '.*b.png' is not in 'metadata.jsonl'"):
        find_captions(tmp_path)
    text(tmp_path / "metadata.csv", "file_name,text\na.png,one")
    with pytest.raises(BadCaption, match=r"metadata.jsonl' and 'metadata.csv' both give captions; keep one"):
        find_captions(tmp_path)


def test_a_comma_without_quotes_does_not_cut_the_caption(tmp_path):
    picture(tmp_path / "a.png")
    text(tmp_path / "metadata.csv", "file_name,text\na.png,a, cat on, mat")
    with pytest.raises(BadCaption, match=r"metadata.csv', line 2: more cells.*put the caption in quotes"):
        find_captions(tmp_path)
    text(tmp_path / "metadata.csv", 'file_name,text\na.png,"a, cat on, mat",')
    assert [file.caption for file in find_captions(tmp_path)] == ["a, cat on, mat"]


MISTAKES = {
    "a.txt": (b" \n", r"caption '.*a.txt' is empty"),
    "b.caption": (b"\xff\xfe\xff", r"cannot read caption '.*b.caption': .*save it as UTF-8"),
    "d.txt": (b"lonely", r"caption '.*d.txt' has no picture 'd.\*' beside it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_by_file(beside, name):
    content, message = MISTAKES[name]
    text(beside / name, content)
    with pytest.raises(BadCaption, match=message):
        find_captions(beside)


def test_all_mistakes_are_told_at_once(beside):
    for name, (content, _) in MISTAKES.items():
        text(beside / name, content)
    picture(beside / "z.png")
    with pytest.raises(BadCaption) as error:
        find_captions(beside)
    for part in ("a.txt", "b.caption", "d.txt", "z.png"):
        assert part in str(error.value)


def test_no_folder_no_pictures_no_captions(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.root: folder '.*nowhere' does not exist"):
        find_captions(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data.root: no pictures in"):
        find_captions(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(BadCaption, match=r"1 picture\(s\) but no captions.*data.instance_prompt"):
        find_captions(tmp_path)


def test_tags_are_shuffled_in_training_behind_those_that_stay():
    captions = Captions(prefix="in sks style,", shuffle=True, keep=1)
    tags = "a dog, red,blue , green, big"
    assert captions(tags, training=False) == "in sks style, " + tags
    torch.manual_seed(0)
    seen = {captions(tags, training=True) for _ in range(40)}
    assert len(seen) > 10
    assert all(one.startswith("in sks style, a dog, ") for one in seen)
    assert all(sorted(one.split(", ")[2:]) == ["big", "blue", "green", "red"] for one in seen)
    torch.manual_seed(3)
    one = captions(tags, training=True)
    torch.manual_seed(3)
    assert captions(tags, training=True) == one
    state = torch.get_rng_state()
    assert Captions()(tags, training=True) == tags
    assert torch.equal(state, torch.get_rng_state())


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="data.captions.keep: 2 tags stay in place anyway"):
        Captions(keep=2)
    with pytest.raises(ValueError, match="data.captions.keep: -1"):
        Captions(shuffle=True, keep=-1)


def test_long_captions_are_found_with_their_tokens():
    named = [("a.png", "one two three four"), ("b.png", "one two three four five"), ("c.png", "x " * 9)]
    assert too_long(named, Words()) == [("b.png", 7), ("c.png", 11)]


class Limited:
    """A tokenizer that counts words."""

    def __init__(self, limit):
        self.model_max_length = limit

    def __call__(self, texts, verbose=True):
        assert texts  # transformers' own fail on an empty list
        return {"input_ids": [[0] * (len(text.split()) + 2) for text in texts]}


def test_either_tokenizer_cuts():
    """SDXL has two, and a caption that one of them cuts is told once."""
    model = SimpleNamespace(tokenizer=Limited(9), tokenizer_2=Limited(5))
    captions = [("a.png", "one two"), ("b.png", "one two three four"), ("c.png", "one " * 9)]
    with pytest.warns(
        UserWarning, match=r"data: 2 caption\(s\) .* 5 tokens and are cut: 'c.png' \(11\), 'b.png' \(6\)"
    ):
        warn_of_long(captions, model)
    with pytest.warns(UserWarning, match=r"preview: 1 caption\(s\) .* 9 tokens and are cut: 'c.png' \(11\);"):
        warn_of_long(captions, SimpleNamespace(tokenizer=model.tokenizer, tokenizer_2=None), "preview")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long(captions[:1], model)
        warn_of_long(captions, None)
        warn_of_long([], model)
