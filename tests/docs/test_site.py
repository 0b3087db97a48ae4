"""The documentation site: built strictly, offline, with all that it shows inside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import visadapt as va
from tests.docs import pages

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
FETCHED = re.compile(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"(?:https?:)?//|<link[^>]*\bhref=\"(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name, reason="builds the site: pip install 'visadapt[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Addresses that lead nowhere: a build that asks the network for something fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [*COMMAND, "docs", str(folder)], cwd=pages.ROOT, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    for page in pages.PAGES[2:]:
        assert (site / page.relative_to(pages.ROOT / "docs")).with_suffix(".html").is_file(), page


def test_nothing_comes_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not FETCHED.search(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_name_has_its_reference(site):
    python = (site / "api" / "python.html").read_text(encoding="utf-8")
    assert not [name for name in va.__all__ if f'id="visadapt.{name}"' not in python and name != "METHODS"]
    methods = (site / "api" / "methods.html").read_text(encoding="utf-8")
    assert not [name for name, cls in va.METHODS.items() if f'id="{cls.__module__}.{name}"' not in methods]


def test_a_broken_link_stops_the_build(tmp_path, site):
    (tmp_path / "conf.py").write_text((pages.ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    (tmp_path / "index.md").write_text("# A page\n\n[gone](nowhere.md)\n")
    done = subprocess.run([*COMMAND, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
