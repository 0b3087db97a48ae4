"""What the pages of the diffusion models share: a prompt with its settings, adapters with strengths, and a button."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps import _runs, _safety, _server
from apps._studio import Acting, Studio, strengths_of
from visadapt.cli.errors import UserError

MOST_STEPS, MOST_LETTERS, SEEDS = 100, 1000, 2**31 - 1


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for.

    Attributes:
        prompt: What to render; a text, never a place.
        negative: What not; empty is the base's "no prompt".
        seed: Of the first picture.
        steps: Of the sampler.
        guidance: Scale of classifier-free guidance.
        number: What the app counts: pictures, or frames.
        strengths: Name of a set -> how far it acts.
    """

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    number: int
    strengths: dict[str, float]

    @property
    def adapted(self) -> bool:
        """Whether any set acts."""
        return any(self.strengths.values())

    def how(self, studio: Studio) -> dict[str, Any]:
        """What a result depends on, as its file says it."""
        labels = {one.name: one.label for one in studio.known}
        return {
            "prompt": self.prompt,
            "base": studio.base,
            "strengths": {labels.get(name, name): value for name, value in self.strengths.items() if value},
            "steps": self.steps,
            "sampler": type(studio.model.sampler).__name__.removesuffix("Scheduler"),
            "guidance": self.guidance,
            "negative": self.negative or None,
        }


def wish(
    prompt: str | None, negative: str | None, seed: float, steps: float, guidance: float, number: float,
    *, strengths: dict[str, float],
) -> Wish:  # fmt: skip
    """What the fields of a page say.

    Raises:
        UserError: There is no prompt, it is too long, or a number is none.
    """
    prompt, negative = (prompt or "").strip(), (negative or "").strip()
    if not prompt:
        raise UserError("", "there is no prompt yet", "type what to render, or choose an example")
    if max(len(prompt), len(negative)) > MOST_LETTERS:
        raise UserError("prompt", f"{len(prompt):,} letters are too many", f"this app takes {MOST_LETTERS:,}")
    if None in (seed, steps, guidance, number) or not 0 <= int(seed) <= SEEDS:
        raise UserError("seed", f"this should be a whole number, 0 to {SEEDS}")
    return Wish(prompt, negative, int(seed), int(steps), float(guidance), int(number), strengths)


def form(
    gr: Any, studio: Studio, settings: dict[str, Any], counted: Callable[[], Any], outputs: Callable[[], list[Any]],
    answer: Callable[[Wish], Any],
) -> None:  # fmt: skip
    """The two columns of a page, wired: for people with a slider for each set, for programs with strengths by name.

    Args:
        gr: Gradio.
        studio: The model.
        settings: ``prompts``, ``steps``, ``guidance`` and ``negative`` that the fields start with.
        counted: Makes the field of the number of pictures or frames.
        outputs: Makes the components of the result.
        answer: Gives their values.
    """
    with gr.Row():
        with gr.Column():
            fields = _fields(gr, settings, counted)
            sliders = [_slider(gr, one) for one in studio.sets]
            upload = gr.File(
                label="More adapters: visadapt, PEFT (zipped folder, or both files), diffusers, kohya",
                file_count="multiple", file_types=_safety.ADAPTERS, type="filepath", height=120,
            )  # fmt: skip
            loaded = gr.State([])

            @gr.render(inputs=[loaded], show_progress="hidden")
            def adapters(rows: list[Acting]) -> None:
                asked = [upload, loaded, *fields, *sliders, *(_slider(gr, one) for one in rows)]
                go = gr.Button("Render", variant="primary", key="go")  # here: it is not there before it can be clicked
                call = {"fn": _server.told(by_sliders, of), "inputs": asked, "outputs": results}
                gr.on([go.click, fields[0].submit], **call, concurrency_id="model", api_visibility="private")

        with gr.Column():
            results = outputs()

    def by_sliders(uploads: list[str] | None, rows: Sequence[Acting], *given: Any) -> Any:
        own, values = given[: len(fields)], given[len(fields) :]
        asked = wish(*own, strengths=dict(zip((one.name for one in (*studio.sets, *rows)), values, strict=True)))
        studio.admit(uploads or ())  # they may have left the model since
        return answer(asked)

    def by_names(uploads: list[str] | None, strengths: Any, *own: Any) -> Any:
        """Render, with strengths by the names of the sets: {"subject": 1, "style": 0.5}."""
        found = [*studio.sets, *studio.admit(uploads or ())]
        return answer(wish(*own, strengths=strengths_of(strengths, found)))

    def of(uploads: list[str] | None, *rest: Any) -> list[str]:
        return list(uploads or ())

    admit = _server.told(lambda uploads: studio.admit(uploads or ()), of)
    upload.change(admit, upload, loaded, api_visibility="private")
    strengths = gr.JSON(visible=False, label="strengths")  # for programs, not for people
    gr.Button(visible=False).click(
        _server.told(by_names, of), [upload, strengths, *fields], results, api_name="render", concurrency_id="model"
    )


def _fields(gr: Any, settings: dict[str, Any], counted: Callable[[], Any]) -> list[Any]:
    """Components of what `wish` takes, in its order."""
    prompts = list(settings.get("prompts") or ())[:6]
    first, most = prompts[0] if prompts else "", {"max_length": MOST_LETTERS}
    prompt = gr.Textbox(first, label="Prompt", lines=1, max_lines=4, elem_id="prompt", **most)
    if prompts:
        gr.Examples([[text] for text in prompts], [prompt], label="Examples", api_visibility="private")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS)
        number = counted()
    with gr.Row():
        steps = gr.Slider(1, MOST_STEPS, settings.get("steps") or 20, step=1, label="Steps")
        guidance = gr.Slider(1, 20, settings.get("guidance") or 5.0, step=0.5, label="Guidance")
    negative = gr.Textbox(settings.get("negative") or "", label="Negative prompt", **most)
    return [prompt, negative, seed, steps, guidance, number]


def _slider(gr: Any, one: Acting) -> Any:
    label, note = f"Strength of {one.label}", one.note or None
    return gr.Slider(0, 2, one.strength, step=0.05, label=label, info=note, interactive=True, key=one.name)


def about(studio: Studio, files: Sequence[Path], config: str) -> str:
    """What runs here, and what is missing."""
    said = [f"Base `{studio.base}`."]
    if files:
        listed = ", ".join(f"`{_runs.told(path)}`" for path in files)
        said.append(f"Adapters: {listed}. At strength 0 the base is left.")
    else:
        said.append(f"No adapters yet: `visadapt fit --config {config}` leaves one in `runs/`, or drop a file.")
    if studio.words:
        said.append(f"New words, which the base reads here, too: {', '.join(f'`{word}`' for word in studio.words)}.")
    return " ".join(said)


def certificates(gr: Any, files: Sequence[Path]) -> None:
    """The parity certificates of the adapters, where there are any; else how to get one."""
    for path in files:
        proof = _runs.certificate(path)
        said = proof or "None yet: `visadapt export FILE --format diffusers` renders with stock code and compares."
        with gr.Accordion(f"Parity certificate of {_runs.told(path)}", open=bool(proof), elem_classes="certificate"):
            gr.Markdown(said)
