"""A diffusion model with sets of adapters: those it starts with, and those that visitors upload."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import visadapt as va
from apps import _runs, _safety, _server
from visadapt.cli.errors import UserError
from visadapt.cli.rundir import set_names
from visadapt.interop.files import read_keys
from visadapt.methods import METHODS  # noqa: F401 - a file names methods, their classes must be imported
from visadapt.report.evaluate import evaluating
from visadapt.report.set_files import split_sets
from visadapt.tasks.start import load_file

KEPT = 16  # uploads that stay on the model; of more, the first ones are loaded again when they are wanted
_PAIR = {"adapter_config.json", "adapter_model.safetensors"}  # a PEFT folder, as two uploads


@dataclass(frozen=True)
class Acting:
    """A set of adapters on the model.

    Attributes:
        name: Name of the set.
        label: What the page calls it.
        strength: Where its slider starts.
        note: What a visitor has to know of it.
    """

    name: str
    label: str
    strength: float = 1.0
    note: str = ""


class Studio:
    """A model on the device that there is, with sets of adapters whose strengths each request chooses.

    Args:
        recipe: Backbone of a diffusion model.
        adapters: Files that are there from the start.
        resting: Those of them whose sliders start at 0.
        apart: Whether sets of a motion's appearance start there, too, as they do in ``visadapt predict``.

    Raises:
        UserError: A file changes the base itself.
        ValueError: A file does not fit the base.
    """

    def __init__(
        self, recipe: Any, adapters: Sequence[Path] = (), resting: Collection[Path] = (), apart: bool = False
    ) -> None:
        self.model: Any = recipe.build().eval()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.base, self.apart = Path(recipe.name).name, apart  # not where on the machine it lies
        self._lock = threading.RLock()
        self._uploads: dict[str, list[Acting]] = {}  # hash of an upload -> its sets, the first upload first
        self.sets: list[Acting] = []
        names = set_names([str(path) for path in (*adapters, *adapters)])  # twice: one alone would have no name
        for path, name in zip(adapters, names, strict=False):
            found = self._loaded(path, str(name), str(name))
            self.sets += [replace(one, strength=0.0) for one in found] if path in resting else found

    @property
    def known(self) -> list[Acting]:
        """All sets that are on the model."""
        return [*self.sets, *(one for found in self._uploads.values() for one in found)]

    @property
    def words(self) -> list[str]:
        """New words that the files have brought."""
        return [token.name for token in getattr(self.model, "new_tokens", ())]

    def admit(self, uploads: Sequence[str]) -> list[Acting]:
        """The sets of uploads, each loaded onto the model once.

        Args:
            uploads: Adapter files, zipped PEFT folders, or the two files of one.

        Raises:
            UserError: One is no adapter, not what it claims, or does not fit the base.
        """
        with self._lock:
            found: list[Acting] = []
            for files in _grouped(uploads):
                found += self._admitted(files, {one.label for one in (*self.sets, *found)})
            while len(self._uploads) > KEPT:
                for one in self._uploads.pop(next(iter(self._uploads))):
                    va.remove(self.model, one.name)
            return found

    @contextmanager
    def acting(self, strengths: Mapping[str, float]) -> Iterator[Any]:
        """The model with sets at strengths, by their names; what is not named rests. One request at a time."""
        with self._lock:
            present = {adapter.name for adapter in va.adapters(self.model).values()}
            chosen = {name: strengths.get(name, 0.0) for name in present}
            with evaluating(self.model), va.strength(self.model, None, **chosen):
                yield self.model

    def _admitted(self, files: Sequence[Path], taken: set[str]) -> list[Acting]:
        path = _safety.adapter(files, _server.workplace())
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        if digest in self._uploads:
            self._uploads[digest] = self._uploads.pop(digest)  # the last one used goes last
            return self._uploads[digest]
        if "tokens" in _header(path)[0]:
            raise UserError(
                files[0].name, "it brings new words, which a model that runs cannot learn", "start with --adapter FILE"
            )
        told = ("PEFT folder" if len(files) > 1 else files[0].stem)[:40]
        label = next(name for i in range(1, 1000) if (name := told if i == 1 else f"{told} {i}") not in taken)
        try:
            found = self._loaded(path, f"u{digest}", label)
        except UserError as error:
            raise UserError(files[0].name, error.what, error.hint) from None
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).replace(f"'{path}'", "it").split())[:300]
            raise UserError(files[0].name, f"this does not fit the base '{self.base}'", reason) from None
        self._uploads[digest] = found
        return found

    def _loaded(self, path: Path, name: str, label: str) -> list[Acting]:
        """The sets of one file, under names that no other file has; none of them if one does not fit."""
        _check(path)
        found: list[Acting] = []
        present = {id(adapter) for adapter in va.adapters(self.model).values()}
        try:
            for own, file in _parts(path).items():
                rests = self.apart and _is_appearance(own)
                more = (f"-{own}", f": {own}") if file != path else ("", "")
                with warnings.catch_warnings(record=True) as noted:
                    warnings.simplefilter("always", UserWarning)
                    load_file(self.model, file, name + more[0])
                other = any("another base" in str(warning.message) for warning in noted)
                note = f"It was trained on another base: {_runs.stated_base(path)}." if other else ""
                found.append(Acting(name + more[0], label + more[1], 0.0 if rests else 1.0, note))
        except Exception:
            for one in {a.name for a in va.adapters(self.model).values() if id(a) not in present}:
                va.remove(self.model, one)
            raise
        self.model.requires_grad_(False)
        self.model.to(self.device)
        return found


def _parts(path: Path) -> dict[str, Path]:
    """Name of each set of a file -> a file with it alone; other tools' files have one set, without a name."""
    plan = json.loads(_header(path)[0].get("visadapt", "{}"))
    names = list(dict.fromkeys(str(entry["name"]) for entry in plan.get("sets", ()))) or [""]
    if len(names) == 1:
        return {names[0]: path}
    whole = Path(shutil.copy(path, _server.workplace()))
    return {file.stem: file for file in split_sets(whole)}


def _is_appearance(name: str) -> bool:
    from visadapt.tasks.video_sets import is_spatial  # with it comes Lightning, seconds that only clips take

    return is_spatial(name)


def _grouped(uploads: Sequence[str]) -> list[list[Path]]:
    """Uploads adapter by adapter: the two files of a PEFT folder are one."""
    paths = [Path(path) for path in uploads]
    pair = [path for path in paths if path.name in _PAIR]
    if {path.name for path in pair} != _PAIR or len(pair) != 2:
        pair = []
    return [*([pair] if pair else []), *([path] for path in paths if path not in pair)]


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Metadata and names of tensors of a file; nothing of a folder."""
    return read_keys(path) if path.is_file() else ({}, [])


def _changed(path: Path) -> list[str]:
    """Tensors of the base that a file holds; new words are none of them."""
    return [key for key in _header(path)[1] if key.startswith("trained.") and not key.endswith(".new_tokens")]


def comparable(adapters: Sequence[Path]) -> list[Path]:
    """Those of the adapters beside which the base can be shown, for files that no one has named."""
    return [path for path in adapters if not _changed(path)]


def _check(path: Path) -> None:
    """Raise where a file would change the base, beside which nothing could be shown then."""
    if changed := _changed(path):
        raise UserError(
            path.name,
            f"it changes the base itself ({len(changed)} tensors), so there is no base to compare with",
            "`visadapt predict` renders with it",
        )


def strengths_of(given: Any, sets: Sequence[Acting]) -> dict[str, float]:
    """Name of a set -> strength, of what a program has sent: numbers by label; what is not named is as its slider.

    Raises:
        UserError: It is something else, or there is no such set.
    """
    if not isinstance(given or {}, dict) or not all(isinstance(v, int | float) for v in (given or {}).values()):
        raise UserError("strengths", 'these should be numbers by name, such as {"style": 0.7}')
    found, labels = {one.name: one.strength for one in sets}, {one.label: one.name for one in sets}
    for label, value in (given or {}).items():
        if label not in labels:
            raise UserError("strengths", f"there is no '{label[:60]}'", f"there are: {', '.join(labels) or 'none'}")
        found[labels[label]] = min(max(float(value), -2.0), 2.0)
    return found
