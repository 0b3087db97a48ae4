"""Groups of options of the diffusion tasks, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from visadapt.losses.diffusion import HuberSchedule, Kind, Sampling


@dataclass
class Noise:
    """Noise and times of training; validation has its own, fixed ones.

    Args:
        sampling: How times are drawn; 0 is clean, 1 is noise.
        t_min: Least time.
        t_max: Largest time.
        mean: Mean of the logit-normal law.
        std: Its deviation.
        offset: Offset noise, 0.05 to 0.1 where very dark or bright pictures are wanted; 0 is off.
        perturbation: Strength of noise that the input has on top of what is predicted (0.1 is usual); 0 is off.
    """

    sampling: Sampling = "uniform"
    t_min: float = 0.0
    t_max: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    offset: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"model.noise: 0 ≤ t_min < t_max ≤ 1 is needed, not {self.t_min} and {self.t_max}")
        if min(self.offset, self.perturbation) < 0 or self.std <= 0:
            raise ValueError("model.noise: offset and perturbation must not be negative, and std must be positive")


@dataclass
class Robust:
    """The loss of an error at its time; validation always reports the plain mean square.

    Args:
        kind: Mean square, or one of two pseudo-Huber losses, which outliers move less.
        width: Where a Huber loss turns from square to absolute.
        width_schedule: How its width depends on the time.
        snr_gamma: γ of min-SNR weights (5 is usual); null is off.
    """

    kind: Kind = "mse"
    width: float = 0.1
    width_schedule: HuberSchedule = "constant"
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ValueError(f"model.loss.width: {self.width}; 0 < width ≤ 1 is needed")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"model.loss.snr_gamma: {self.snr_gamma}; it must be positive (5 is usual), or null")


@dataclass
class Loss(Robust):
    """The training loss of text-to-image; validation always reports the plain mean square.

    Args:
        kind: Mean square, or one of two pseudo-Huber losses, which outliers move less.
        width: Where a Huber loss turns from square to absolute.
        width_schedule: How its width depends on the time.
        snr_gamma: γ of min-SNR weights (5 is usual); null is off.
        prior_weight: Weight of class images (prior preservation), where the data bring any.
        auxiliary: Break-for-Make's auxiliary pictures: class images train this factor of the UNet's adapters alone, the
            other pictures the other one. "up" where content is learned, "down" for style; null trains all with all.
    """

    prior_weight: float = 1.0
    auxiliary: Literal["up", "down"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_weight < 0:
            raise ValueError(f"model.loss.prior_weight: {self.prior_weight}; it must not be negative")


@dataclass
class Preview:
    """Pictures from fixed prompts and seeds, of the base and of what is trained.

    Args:
        prompts: What to render; empty takes the first captions of the validation data.
        seeds: Seeds of each prompt, a picture each.
        steps: Steps of the sampler.
        guidance: Scale of classifier-free guidance; 1 is off.
        size: Side in pixels, or height and width; null is the base's own.
        negative: Negative prompt; null is the base's "no prompt".
    """

    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    steps: int = 20
    guidance: float = 5.0
    size: int | list[int] | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.seeds:
            raise ValueError("model.preview: at least one step and one seed are needed")
        sides = [self.size] if isinstance(self.size, int) else self.size or []
        if len(sides) > 2 or any(side < 8 or side % 8 for side in sides):
            raise ValueError(f"model.preview.size: {self.size}; give one side or height and width, multiples of 8")


@dataclass
class Paths:
    """How appearance and motion are told apart; the sets of adapters are called `spatial` and `temporal`.

    Args:
        mode: "dual": in every step the spatial set learns a frame of the clip, and the temporal set the clip, with the
            spatial set there but at rest. "sequential": the spatial set learns frames, then the temporal set clips,
            for networks whose layers see space and time at once. null takes the one of these two that suits.
            "temporal": the temporal set alone learns clips. "spatial": the spatial set alone learns frames. "single":
            all sets, of any name, learn clips together.
        debias: β of the appearance-debiased loss of clips; null is the plain loss alone.
        skip: Share of steps in which the spatial set neither learns nor acts.
        appearance: Share of the steps of "sequential" that go to the spatial set.
    """

    mode: Literal["dual", "sequential", "temporal", "spatial", "single"] | None = None
    debias: float | None = 1.0
    skip: float = 0.2
    appearance: float = 0.5

    def __post_init__(self) -> None:
        if self.debias is not None and self.debias < 0:
            raise ValueError(f"model.paths.debias: {self.debias}; it must not be negative, null is the plain loss")
        if not 0 <= self.skip < 1:
            raise ValueError(f"model.paths.skip: {self.skip}; 0 ≤ skip < 1 is needed")
        if not 0 < self.appearance < 1:
            raise ValueError(f"model.paths.appearance: {self.appearance}; 0 < appearance < 1 is needed")


@dataclass
class ClipPreview(Preview):
    """Videos from fixed prompts and seeds, of the base and of what is trained.

    Args:
        prompts: What to render; empty takes the first captions of the validation data.
        seeds: Seeds of each prompt, a video each.
        steps: Steps of the sampler.
        guidance: Scale of classifier-free guidance; 1 is off.
        size: Side in pixels, or height and width; null is the base's own.
        negative: Negative prompt; null is the base's "no prompt".
        frames: Frames of a video; null is the base's own number.
        image: Picture to bring to motion: the noise that every frame starts from is that of its inverted latents.
        clip: Reference clip, a video or a folder of frames; a part of the noise is that of its inverted latents.
        share: How much of the noise is inverted; null is all of a picture's, and 0.3 of a clip's, for which 0.1 to 0.5
            are usual.
    """

    seeds: list[int] = field(default_factory=lambda: [0])
    frames: int | None = None
    image: str | None = None
    clip: str | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"model.preview.frames: {self.frames}; at least one is needed")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"model.preview.share: {self.share}; it is a share, 0 to 1")
        if self.image is not None and self.clip is not None:
            raise ValueError("model.preview: the noise is that of an image or of a clip; set one of them to null")
        if self.share is None and (self.image or self.clip) is not None:
            self.share = 0.3 if self.image is None else 1.0
