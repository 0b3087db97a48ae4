"""Links and pictures of the pages exist; no page asks another host for a picture."""

import re
from urllib.parse import unquote

import pytest

from tests.docs import pages


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_links_lead_somewhere(page):
    missing = []
    for line, target in pages.links(page):
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            missing.append(f"line {line}: there is no file '{path}'")
        elif anchor and file.suffix == ".md" and anchor not in pages.anchors(file):
            missing.append(f"line {line}: '{path or page.name}' has no heading '#{anchor}'")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_pictures_are_local(page):
    pictures = [token.attrGet("src") for token, _ in pages.inline(page) if token.type == "image"]
    assert not [source for source in pictures if "//" in source]


def test_nothing_private_is_in_pages_or_notebooks():
    host = "(py" + "pi|npm" + r"js)\.(o" + "rg|c" + "om)|python" + "hosted"
    for path in [*pages.PAGES, *pages.ROOT.glob("notebooks/*.ipynb"), *pages.ROOT.glob("docs/*.py")]:
        assert not re.search(host + "|/home/|" + str(pages.ROOT), path.read_text(encoding="utf-8")), path


def test_a_wrong_link_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading: *two*\n\n[a](b.md#c) ![d](e.png)\n\n| f |\n|---|\n| [g](#one-heading-two) [h](https://x) |\n"
    )
    assert list(pages.links(page)) == [(3, "b.md#c"), (3, "e.png"), (7, "#one-heading-two")]
    assert pages.anchors(page) == {"one-heading-two"}
