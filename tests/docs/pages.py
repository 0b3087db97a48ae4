"""What the Markdown pages hold: commands, blocks of code, links; read with the parser that rich brings along."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
# Tables of results hold figures and the commands behind them, which have pages of their own.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if "results" not in page.parts]
RUNNABLE = re.compile(r"<!-- runnable(: slow)? -->")
_OPERATORS = {"&&", "||", ";", "|"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line on the page, and what is said about running it."""

    language: str
    text: str
    line: int
    runnable: bool = False
    slow: bool = False


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> Iterator[Block]:
    before = ""
    for token in tokens(page):
        if token.type == "fence":
            mark = RUNNABLE.fullmatch(before.strip())
            language = (token.info.split() or [""])[0]
            line = token.map[0] + 2 if token.map else 0
            yield Block(language, token.content, line, mark is not None, bool(mark and mark[1]))
        before = token.content if token.type == "html_block" else ""


def inline(page: Path) -> Iterator[tuple[Token, int]]:
    """Tokens inside paragraphs, tables and headings, with the line where these begin."""
    for token in tokens(page):
        for child in token.children or ():
            yield child, (token.map or [0])[0] + 1


def commands(page: Path, programme: str) -> Iterator[tuple[int, list[str], bool]]:
    """Line and words of each command line that begins with ``programme``, and whether the text only mentions it."""
    for block in blocks(page):
        if block.language in ("bash", "sh", "console"):
            for words in split(block.text):
                if words[:1] == [programme]:
                    yield block.line, words, False
    for token, line in inline(page):
        if token.type == "code_inline" and token.content.startswith(f"{programme} "):
            yield from ((line, words, True) for words in split(token.content))


def split(text: str) -> Iterator[list[str]]:
    """Words of each command of a shell text: comments, line continuations, `&&` and variables before are dealt with."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        found: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _OPERATORS:
                found.append(word)
                continue
            while found and re.match(r"[A-Z_]+=", found[0]):
                found.pop(0)
            if found:
                yield found
            found = []


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Line and target of each link and picture that points into the repository."""
    for token, line in inline(page):
        target = token.attrGet("href") if token.type == "link_open" else token.attrGet("src")
        if token.type in ("link_open", "image") and target and not re.match(r"[a-z]+:", str(target)):
            yield line, str(target)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    found, all_tokens = set(), tokens(page)
    for i, token in enumerate(all_tokens):
        if token.type == "heading_open":
            heading = "".join(child.content for child in all_tokens[i + 1].children or ())
            found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found
