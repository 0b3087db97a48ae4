"""Prompts as data: texts, files and captions, each with every seed."""

import pytest

from visadapt.data.captioned_scenes import Scenes
from visadapt.data.text_prompts import TextPrompts


def test_batches_are_prompts_with_each_seed(tmp_path):
    file = tmp_path / "more.TXT"
    file.write_bytes("\ufeffa blue star\r\n\r\n  ein grüner Kreis \n".encode())
    data = TextPrompts([" a cat ", str(file)], [3, 1], batch_size=4)
    first, second = data.predict_dataloader()
    assert first == {
        "numbers": [0, 0, 1, 1],
        "captions": ["a cat", "a cat", "a blue star", "a blue star"],
        "seeds": [3, 1, 3, 1],
    }
    assert second["captions"] == ["ein grüner Kreis"] * 2
    with pytest.raises(NotImplementedError, match="only predict"):
        data.dataset("train")


def test_captions_of_data_come_once_each():
    source = Scenes("subject", test_size=12)
    found = TextPrompts(source=source).dataset("predict")
    captions = [found[i]["caption"] for i in range(len(found))]
    assert set(captions) == {picture.caption for picture in source.pictures("test")}
    assert len(set(captions)) == len(captions)
    assert {found[i]["seed"] for i in range(len(found))} == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.prompts: give texts"),
        ({"prompts": []}, "there is none in the list"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"prompts": ["no.txt"]}, "there is no file 'no.txt'"),
        ({"prompts": ["a"], "seeds": []}, "data.seeds"),
        ({"prompts": ["a"], "seeds": [1, 1]}, "different whole numbers"),
        ({"prompts": ["a"], "seeds": [2**63]}, "data.seeds"),
        ({"prompts": ["a"], "batch_size": 0}, "data.batch_size"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TextPrompts(**options)
    assert TextPrompts(["a"]).prompts == ["a"]
