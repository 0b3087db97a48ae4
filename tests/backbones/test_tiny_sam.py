"""The shipped SAM segments what it never saw as well as its recipe states, and is told apart from other files."""

import json
from pathlib import Path

import pytest

import visadapt.backbones
from tests.backbones.recipes import recipe
from visadapt.backbones.sam import SAM

STATED = json.loads((Path(visadapt.backbones.__file__).parent / "tiny" / "tiny_sam.json").read_text())


@pytest.mark.parametrize("kind", ["scenes", "drawings"])
def test_prompted_masks_of_held_out_images_are_as_good_as_stated(kind):
    tiny_sam = recipe("tiny_sam")
    draw = {
        "scenes": lambda i: tiny_sam.draw_scene(99, i, tiny_sam.SIDE, train=False),
        "drawings": lambda i: tiny_sam.plan(99, i),
    }[kind]
    found = tiny_sam.held_out(SAM("tiny_sam").build().eval(), draw, count=60)  # the recipe states that of 300
    for name, stated in STATED["held_out"][kind].items():
        assert found[name] == pytest.approx(stated, abs=0.07)


def test_the_recipe_states_what_it_made():
    sam = SAM("tiny_sam").build()
    assert sum(p.numel() for p in sam.state_dict().values()) == STATED["parameters"]
    assert STATED["config"] == "configs/pretrain/tiny_sam.py"
    assert (Path(__file__).parents[2] / STATED["config"]).is_file()
