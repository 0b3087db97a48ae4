"""Which picture has which caption: text files beside the pictures, a metadata table, one prompt, repeat folders."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from visadapt.data.images import SUFFIXES
from visadapt.data.masks import raise_all

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
_REPEATS = re.compile(r"(\d+)_(.+)")


class BadCaption(ValueError):
    """A picture without a usable caption, or a caption without its picture; the message names the file."""


@dataclass(frozen=True)
class CaptionedFile:
    """A picture file, its caption, and how often an epoch shows it."""

    path: Path
    caption: str
    repeats: int = 1


@dataclass(frozen=True)
class Captions:
    """What is done to a caption before it is encoded; the names are those of kohya's options.

    Args:
        prefix: Text in front of every caption, such as a style's trigger words.
        shuffle: Put the tags of a caption (its parts between commas) in a new order each time, in training.
        keep: Tags at the beginning that stay in place when shuffled (``keep_tokens``).
    """

    prefix: str = ""
    shuffle: bool = False
    keep: int = 0

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"data.captions.keep: {self.keep} must be 0 or the number of tags that stay in place")
        if self.keep and not self.shuffle:
            raise ValueError(f"data.captions.keep: {self.keep} tags stay in place anyway; set data.captions.shuffle")

    def __call__(self, caption: str, training: bool) -> str:
        """The caption to encode; the order of its tags comes from torch's global state."""
        if self.shuffle and training:
            tags = [tag.strip() for tag in caption.split(",")]
            rest = tags[self.keep :]
            caption = ", ".join(tags[: self.keep] + [rest[i] for i in torch.randperm(len(rest)).tolist()])
        return f"{self.prefix.strip()} {caption}".strip()


def find_captions(
    root: Path, instance_prompt: str | None = None, column: str = "text", leave_out: Sequence[Path] = ()
) -> list[CaptionedFile]:
    """The pictures of a folder with their captions.

    In this order: ``metadata.jsonl`` or ``metadata.csv`` in the root, with ``file_name`` and a column of captions
    (Hugging Face's imagefolder; a picture may have several rows); folders named ``10_sks dog`` (kohya), whose
    pictures come 10 times an epoch and whose name is the caption of those without a file of their own; else
    ``NAME.txt`` or ``NAME.caption`` beside ``NAME.png``, also in subfolders. Line breaks in captions become spaces.

    Args:
        root: Folder of the pictures.
        instance_prompt: The caption of every picture, instead of all that.
        column: Column of the captions in the metadata.
        leave_out: Folders within the root that hold something else.

    Raises:
        FileNotFoundError: There is no such folder, or it has no pictures.
        BadCaption: Lists pictures without a caption, captions without a picture, empty and unreadable ones, rows
            of the metadata that name no picture.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: folder '{root}' does not exist")
    files = list(walk(root, leave_out))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise FileNotFoundError(f"data.root: no pictures in '{root}'; known suffixes: {', '.join(SUFFIXES)}")
    return captions_of(root, pictures, files, instance_prompt, column)


def captions_of(
    root: Path,
    shown: Sequence[Path],
    files: Sequence[Path],
    instance_prompt: str | None = None,
    column: str = "text",
    what: str = "picture",
) -> list[CaptionedFile]:
    """The captions of given files, or of folders that stand for one thing each; see `find_captions`.

    Args:
        root: Folder that they are in.
        shown: What wants a caption.
        files: All files, those with the captions among them.
        instance_prompt: The caption of all, instead of files.
        column: Column of the captions in the metadata.
        what: What a message calls one of them.

    Raises:
        BadCaption: As `find_captions`.
    """
    tables = [root / name for name in METADATA if (root / name).is_file()]
    texts = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]
    problems: list[str] = []
    if instance_prompt is not None:
        stems = {_stem(path) for path in shown}
        rivals = [*tables, *(text for text in texts if text.with_suffix("") in stems)]
        found = _prompted(root, shown, instance_prompt, rivals, what)
    elif tables:
        found = _from_table(tables, shown, column, problems, what)
    else:
        found = _from_texts(root, shown, texts, problems, what)
    raise_all(problems, root, BadCaption)
    return found


def _stem(path: Path) -> Path:
    return path if path.is_dir() else path.with_suffix("")


def walk(folder: Path, leave_out: Sequence[Path]) -> Iterator[Path]:
    """Files in a folder and below, sorted, without hidden ones."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or any(path.resolve() == other.resolve() for other in leave_out):
            continue
        if path.is_dir():
            yield from walk(path, leave_out)
        elif path.is_file():
            yield path


def _repeats(root: Path, path: Path) -> tuple[int, str | None]:
    """How often a picture comes and the caption that its folder gives it, by the first folder below the root."""
    match = _REPEATS.fullmatch(path.relative_to(root).parts[0]) if path.parent != root else None
    return (int(match[1]), match[2].strip()) if match else (1, None)


def _prompted(
    root: Path, pictures: Sequence[Path], prompt: str, others: Sequence[Path], what: str
) -> list[CaptionedFile]:
    if not prompt.strip():
        raise BadCaption(f"data.instance_prompt is empty; say what the {what}s show, such as 'a photo of sks dog'")
    if others:
        raise BadCaption(
            f"data.instance_prompt: '{root}' has captions, too ('{others[0].relative_to(root)}'); "
            "remove the prompt, or move the caption files away"
        )
    return [CaptionedFile(path, prompt.strip(), _repeats(root, path)[0]) for path in pictures]


def _from_texts(
    root: Path, pictures: Sequence[Path], texts: Sequence[Path], problems: list[str], what: str
) -> list[CaptionedFile]:
    by_stem: dict[Path, Path] = {}
    for text in sorted(texts, key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower()), reverse=True):
        by_stem[text.with_suffix("")] = text  # .txt last: it wins
    found, stems = [], {_stem(path) for path in pictures}
    if not by_stem and not any(_repeats(root, path)[1] for path in pictures):
        raise BadCaption(
            f"data.root: '{root}' has {len(pictures)} {what}(s) but no captions: put NAME.txt beside NAME"
            f"{pictures[0].suffix}, or metadata.jsonl into the folder, or set data.instance_prompt"
        )
    problems += [
        f"caption '{text}' has no {what} '{text.with_suffix('.*').name}' beside it; add or delete"
        for stem, text in sorted(by_stem.items())
        if stem not in stems
    ]
    for path in pictures:
        repeats, caption = _repeats(root, path)
        own = by_stem.get(_stem(path))
        if own is not None:
            caption = _read(own, problems, what)
        elif caption is None:
            problems.append(f"{what} '{path}' has no caption; write '{_stem(path).name}.txt' beside it")
        if repeats < 1:
            problems.append(f"{what} '{path}' is in a folder of {repeats} repeats; rename or move the folder")
        if caption is not None:
            found.append(CaptionedFile(path, caption, repeats))
    return found


def _read(path: Path, problems: list[str], what: str) -> str | None:
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"cannot read caption '{path}': {error}; save it as UTF-8")
        return None
    if not caption:
        problems.append(f"caption '{path}' is empty; write what the {what} shows, or delete both files")
        return None
    return caption


def _from_table(
    tables: Sequence[Path], pictures: Sequence[Path], column: str, problems: list[str], what: str
) -> list[CaptionedFile]:
    if len(tables) > 1:
        raise BadCaption(f"data.root: '{tables[0]}' and '{tables[1].name}' both give captions; keep one")
    table = tables[0]
    found, known = [], {path.resolve() for path in pictures}
    for line, row in _rows(table, problems):
        where = f"'{table}', line {line}"
        name, caption = row.get("file_name"), row.get(column)
        if name is None or caption is None:
            key = "file_name" if name is None else column
            hint = "" if key == "file_name" else "; set data.caption_column"
            problems.append(f"{where}: there is no '{key}' among {', '.join(map(str, row)) or 'no columns'}{hint}")
        elif (path := table.parent / str(name)).resolve() not in known:
            problems.append(f"{where}: there is no {what} '{name}' in '{table.parent}'")
        elif not (caption := " ".join(str(caption).split())):
            problems.append(f"{where}: the caption of '{name}' is empty")
        else:
            found.append(CaptionedFile(path, caption))
    if not problems:
        named = {file.path.resolve() for file in found}
        problems += [f"{what} '{path}' is not in '{table.name}'" for path in pictures if path.resolve() not in named]
    return found


def _rows(table: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a table; those that cannot be read go to the problems."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadCaption(f"cannot read '{table}': {error}; save it as UTF-8") from error
    if table.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True), restkey="surplus")
        for row in reader:
            if any(cell.strip() for cell in row.pop("surplus", None) or ()):
                cells = f"'{table}', line {reader.line_num}: more cells than columns"
                problems.append(f"{cells}; put the caption in quotes, it has a comma")
                continue
            yield reader.line_num, {key: value for key, value in row.items() if value is not None}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"'{table}', line {number}: {error}; each line must be one JSON object")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"'{table}', line {number}: {line[:40]} is no JSON object")


def too_long(captions: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[str, int]]:
    """Names and token counts, begin and end included, of the captions that a tokenizer would cut.

    Args:
        captions: Name of the picture, and its caption.
        tokenizer: A transformers tokenizer.
    """
    if not captions:  # transformers' tokenizers refuse an empty list
        return []
    texts = sorted({caption for _, caption in captions})
    counts = dict(zip(texts, map(len, tokenizer(texts, verbose=False)["input_ids"])))
    return [(name, counts[text]) for name, text in captions if counts[text] > tokenizer.model_max_length]


def warn_of_long(captions: Sequence[tuple[str, str]], model: Any, where: str = "data") -> None:
    """Say which captions the tokenizers of a model cut; SDXL has two, which may have different limits.

    Args:
        captions: Name of the picture, and its caption.
        model: Has ``tokenizer`` and perhaps ``tokenizer_2``; None or a model without them says nothing.
        where: What the captions belong to, for the message.
    """
    cut: dict[str, int] = {}
    limits = set()
    for tokenizer in (getattr(model, "tokenizer", None), getattr(model, "tokenizer_2", None)):
        if tokenizer is not None and (long := too_long(captions, tokenizer)):
            cut |= {name: max(count, cut.get(name, 0)) for name, count in long}
            limits.add(tokenizer.model_max_length)
    if cut:
        listed = ", ".join(f"'{name}' ({count})" for name, count in list(cut.items())[:3])
        rank_zero_warn(
            f"{where}: {len(cut)} caption(s) have more than the tokenizer's {min(limits)} tokens and are cut: "
            f"{listed}{' …' if len(cut) > 3 else ''}; shorten them"
        )
