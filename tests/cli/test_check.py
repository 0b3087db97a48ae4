"""The grid on the terminal: tables that fit, and the same methods in all of them."""

from itertools import pairwise

import pytest

from visadapt.cli.check import parts
from visadapt.cli.main import main


@pytest.mark.parametrize(("room", "expected"), [(100, [4]), (12, [2, 1, 1]), (1, [1, 1, 1, 1])])
def test_tables_take_as_many_methods_as_fit(room, expected):
    found = list(parts([5, 6, 10, 7], room))
    assert [part.stop - part.start for part in found] == expected
    assert found[0].start == 0
    assert found[-1].stop == 4
    assert all(a.stop == b.start for a, b in pairwise(found))


def test_names_stay_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["check", "--methods=SSF,DoRA,Hydra"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 50
    for name in ("SSF", "DoRA", "Hydra"):
        assert printed.count(f" {name} ") == 2
    assert "0 fail" in printed
