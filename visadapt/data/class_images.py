"""Pictures of the class for prior preservation: those of a folder, and how many are still to be generated."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visadapt.core.files import replacing
from visadapt.data.images import SUFFIXES


class ClassImages:
    """A folder of pictures of the class; a task fills it up before training begins.

    In ``configure_optimizers``, before batches are counted, on the first process:
    ``for number in images.missing(): images.add(number, picture)``, with the picture made from ``prompt`` by a
    generator seeded with ``number``; a run that was killed in between goes on to the same pictures.

    Prior preservation: Ruiz et al. 2022, DreamBooth, arXiv 2208.12242 (no official code).

    Args:
        root: Folder of the pictures; made when the first one is added.
        prompt: What they show, such as "a photo of a dog".
        count: Wanted number; 0 takes those that are there.
    """

    def __init__(self, root: str | Path, prompt: str, count: int = 0) -> None:
        self.root = Path(root).expanduser()
        self.prompt, self.count = prompt, count
        if not prompt.strip():
            raise ValueError("data.class_prompt is empty; say what the class is, such as 'a photo of a dog'")
        if count < 0:
            raise ValueError(f"data.class_images: {count} must be 0 (those of the folder) or a number")

    def paths(self) -> list[Path]:
        """The pictures there are."""
        if not self.root.is_dir():
            return []
        return sorted(p for p in self.root.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")

    def missing(self) -> range:
        """Numbers of the pictures that are still wanted."""
        return range(len(self.paths()), self.count)

    def add(self, number: int, picture: Image.Image) -> Path:
        """Save a picture; it appears whole."""
        path = self.root / f"generated_{number:05d}.png"
        with replacing(path) as temporary:
            picture.save(temporary, format="PNG")
        return path
