"""Which sets of appearance a batch needs."""

import pytest
import torch

from visadapt.tasks.video_sets import sources

NAMES = {"spatial-0", "spatial-1", "temporal"}


def test_clips_go_to_their_own_sets_and_a_batch_that_names_none_is_refused():
    found = {name: rows.tolist() for name, rows in sources(torch.tensor([1, 0, 1]), 3, NAMES, 2)}
    assert found == {"spatial-0": [1], "spatial-1": [0, 2]}
    shared = {name: rows.tolist() for name, rows in sources(None, 3, {"spatial", "temporal"}, 1)}
    assert shared == {"spatial": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"the batches have no 'clip'"):
        list(sources(None, 3, NAMES, 2))
