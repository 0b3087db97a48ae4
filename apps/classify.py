"""A picture in, probabilities out: the base and the adapted network side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import visadapt as va
from apps import _runs, _safety, _server
from visadapt.cli.errors import UserError
from visadapt.data.images import read_rgb
from visadapt.report.evaluate import evaluating

TASKS = ("Classification",)
SHOWN = 5  # classes of a result
DOMAINS = ("upright", "inverted", "scan", "texture", "rotated")  # of the examples


class Classifier:
    """A network with sets of adapters, whose strengths each request chooses.

    Args:
        adapters: Files of one base and the same classes; none gives the shipped base alone.
    """

    def __init__(self, adapters: Sequence[Path] = ()) -> None:
        recipe, self.model, self.names = _runs.classifier(adapters)
        self.base = str(recipe.name)
        self.preprocess = recipe.preprocess(False)
        self.sets = list(dict.fromkeys(adapter.name for adapter in va.adapters(self.model).values()))

    def probabilities(self, image: Image.Image, strengths: Sequence[float]) -> dict[str, float]:
        """Name of a class -> probability, with each set of adapters at its strength."""
        inputs = self.preprocess(image)[None]
        with evaluating(self.model), torch.no_grad(), va.strength(self.model, **dict(zip(self.sets, strengths))):
            shares = self.model(inputs).softmax(1)[0]
        return dict(zip(self.names, shares.tolist(), strict=True))

    def answer(self, upload: str | None, *strengths: float) -> tuple[Image.Image, dict[str, float], dict[str, float]]:
        """The picture, and the probabilities of the base and of the adapted network.

        Raises:
            UserError: nothing was uploaded, or it is no picture.
        """
        if not upload:
            raise UserError("", "there is no picture yet", "upload one, or choose an example")
        image = read_rgb(_safety.picture(upload))
        base = self.probabilities(image, [0.0] * len(self.sets))
        return enlarged(image), base, self.probabilities(image, strengths)


def enlarged(image: Image.Image, side: int = 224) -> Image.Image:
    """A small picture with its pixels drawn large, so that one sees what the network sees."""
    factor = max(1, side // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def examples(folder: Path, classifier: Classifier) -> list[Path]:
    """Digits of the test set in domains that the base knows and does not know; none for another base."""
    from visadapt.data.digits import Digits

    if classifier.base != "tiny_digits":
        return []
    found = []
    for i, domain in enumerate(DOMAINS):
        data: Any = Digits(domain=domain)
        images = data.dataset("test").images
        for j in (2 * i, 2 * i + 1):
            path = folder / f"{domain}_{j}.png"
            Image.fromarray(np.ascontiguousarray(images[j].permute(1, 2, 0).numpy())).save(path)
            found.append(path)
    return found


def build(adapters: Sequence[str | Path] = ()) -> Any:
    """The page.

    Args:
        adapters: Adapter files; none takes the newest of the runs below ``runs/``.
    """
    gr = _server.gradio()
    files = _runs.given(adapters) or _runs.newest(TASKS)[:1]
    classifier = Classifier(files)
    drawn = examples(_server.examples(), classifier)
    with gr.Blocks(title="visadapt classify", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# Classify\n{_about(classifier, files)}")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Picture", file_types=_safety.PICTURES, type="filepath", height=120)
                shown = gr.Image(label="What was read", interactive=False, format="png", height=220, buttons=[])
                sliders = [gr.Slider(0, 2, 1, step=0.05, label=f"Strength of '{name}'") for name in classifier.sets]
                go = gr.Button("Classify", variant="primary")
            base = gr.Label(label="Base", num_top_classes=SHOWN, elem_id="base")
            adapted = gr.Label(label="Adapted", num_top_classes=SHOWN, elem_id="adapted")
        if drawn:
            names = [(str(path), path.stem.partition("_")[0]) for path in drawn]
            gallery = gr.Gallery(
                names, label="Examples", columns=len(names), allow_preview=False, height=150, elem_id="examples"
            )
        answer = _server.told(classifier.answer, lambda path, *rest: _server.one(path))
        call = {"fn": answer, "inputs": [upload, *sliders], "outputs": [shown, base, adapted]}
        go.click(**call, api_name="classify")
        upload.upload(**call, api_visibility="private")
        for slider in sliders:
            slider.release(**call, api_visibility="private")
        if drawn:

            def choose(event: gr.SelectData) -> str:  # type: ignore[name-defined]  # Gradio goes by it
                return str(drawn[event.index])

            gallery.select(choose, None, upload, api_visibility="private").then(**call, api_visibility="private")
    return blocks


def _about(classifier: Classifier, files: Sequence[Path]) -> str:
    """What runs here, and what is missing."""
    known = f"Base `{classifier.base}`, {len(classifier.names)} classes."
    if not files:
        return f"{known} No adapters yet: `visadapt fit --config configs/quickstart.yaml` leaves one in `runs/`."
    return f"{known} Adapters: {', '.join(f'`{_runs.told(path)}`' for path in files)}. At strength 0 the base is left."
