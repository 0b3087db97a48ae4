"""Text-to-video: each set gets the gradient of its own loss, whatever the mode; resume is exact; files hold both."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

import visadapt as va
from tests.diffusion_training import train
from tests.tiny_video import FRAMES, video_base
from tests.training import Crash, CrashAt, weights
from tests.video_training import ClipsData, batch, sets, task
from visadapt.losses import diffusion as dm
from visadapt.losses import video as vd
from visadapt.tasks.diffusion_options import ClipPreview, Noise, Paths, Robust
from visadapt.tasks.text_to_video import TextToVideo
from visadapt.tasks.video_passes import Sets, plan

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS, CHECKPOINTED = Paths("dual", skip=0.0), {"grad_checkpointing": True}


def made(**kwargs):
    """A task whose adapters do something."""
    found = task(**kwargs)
    found.configure_model()
    generator = torch.Generator().manual_seed(1)
    for adapter in va.adapters(found.model).values():
        nn.init.normal_(adapter.up, std=0.1, generator=generator)
    return found


def step(found, given, scale=1.0, seed=0, skipped=False):
    """Losses of the passes by kind, and gradients by name, of one training step without a trainer."""
    found._sets = Sets(found.model)
    found._passes = list(found._losses(given, found.latents(given), torch.Generator().manual_seed(seed), skipped))
    kinds = [(one.kind, one.loss.item()) for one in found._passes]
    found.model.zero_grad()
    found.backward(torch.stack([one.loss for one in found._passes]).sum() * scale)
    return kinds, {n: p.grad for n, p in found.model.named_parameters() if p.grad is not None}


def error_of(model, latents, captions, times, noise):
    """Prediction minus noise by diffusers' own scheduler."""
    noisy = torch.stack([model.scheduler.add_noise(x, n, t) for x, n, t in zip(latents, noise, times)])
    return model(noisy, times, model.spec.encode_text(model, captions)) - noise


def reference(found, given, beta=1.0):
    """Both losses of the paper with the draws of seed 0, each with its sets on, and their gradients."""
    generator, latents = torch.Generator().manual_seed(0), given["latents"]
    times = (torch.rand(2, generator=generator, dtype=torch.float64) * 1000).long()
    noise = torch.randn(latents.shape, generator=generator)
    torch.rand(2, generator=generator)
    frame, anchor = torch.randint(latents.shape[1], (2, 2), generator=generator)
    model, rows = found.model, torch.arange(2)
    with va.strength(model, temporal=0.0):
        of_frame = error_of(
            model, latents[rows, frame][:, None], given["frame_captions"], times, noise[rows, frame][:, None]
        )
        spatial = of_frame.square().mean()
        parameters = {n: p for n, p in model.named_parameters() if ".spatial." in n}
        gradients = dict(zip(parameters, torch.autograd.grad(spatial, list(parameters.values()))))
    of_clip = error_of(model, latents, given["captions"], times, noise)
    temporal = vd.temporal(of_clip, anchor, beta).mean()
    parameters = {n: p for n, p in model.named_parameters() if ".temporal." in n}
    gradients |= dict(zip(parameters, torch.autograd.grad(temporal, list(parameters.values()))))
    return spatial.item(), temporal.item(), gradients


# --- the two paths -----------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_set_gets_the_gradient_of_its_own_loss(checkpointing):
    given = batch(2)
    found = made(paths=ALWAYS, backbone={"grad_checkpointing": checkpointing})
    found.model.train()
    kinds, gradients = step(found, given)
    spatial, temporal, wanted = reference(made(), given)
    assert [kind for kind, _ in kinds] == ["appearance", "motion"]
    assert [value for _, value in kinds] == pytest.approx([spatial, temporal], rel=1e-5)
    assert gradients.keys() == wanted.keys()
    assert {name.split(".adapters.")[1].partition(".")[0] for name in wanted} == {"spatial", "temporal"}
    for name, gradient in wanted.items():
        close = 1e-5 * float(gradient.abs().max())  # single precision: sums in another order
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=close), name
    assert all(p.requires_grad for n, p in found.model.named_parameters() if ".adapters." in n)
    assert {adapter.strength for adapter in va.adapters(found.model).values()} == {1.0}
    halved = step(found, given, scale=0.5)[1]  # accumulation and gradient scaling reach every pass
    name = max(halved)
    assert torch.allclose(halved[name], gradients[name] / 2, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["unet3d", "latte", "wan"])
def test_presets_of_the_other_families_learn_apart(family):
    """Also where every layer sees space and time, and under checkpointing."""
    lora = va.LoRA(rank=2)
    adapters = [va.Adaptation(lora, [name], name) for name in ("spatial", "temporal")]
    found = made(name=video_base(family), adapters=adapters, paths=Paths(skip=0.0), backbone=CHECKPOINTED)
    found.model.train()
    count = 5 if family == "wan" else FRAMES  # which its VAE makes two
    videos = torch.rand(1, count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = {"latents": found.latents({"videos": videos}), "captions": ["a goes"], "frame_captions": ["a"]}
    assert given["latents"].shape[1] > 1
    seen = []
    for found._switch in (1, 0):  # the first part of a sequence of two, then the second
        kinds, gradients = step(found, given)
        learned = {name.split(".adapters.")[1].partition(".")[0] for name in gradients}
        seen.append(([kind for kind, _ in kinds], learned))
    both = (["appearance", "motion"], {"spatial", "temporal"})
    of_two = [(["appearance"], {"spatial"}), (["motion"], {"temporal"})]
    assert seen == (of_two if family == "wan" else [both, both])


def test_skipped_steps_leave_the_spatial_set_out():
    given = batch(2)
    other = made(paths=ALWAYS)
    kinds, gradients = step(made(paths=ALWAYS), given, skipped=True)
    assert [kind for kind, _ in kinds] == ["motion"]
    assert all(".temporal." in name for name in gradients)
    assert kinds[0][1] != step(other, given)[0][1][1]
    for adapter in va.adapters(other.model, "spatial").values():
        nn.init.zeros_(adapter.up)
    assert kinds[0] == step(other, given)[0][1]


def test_a_sharded_model_cannot_have_a_set_per_clip():
    found = task(clips=2)
    found._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="use strategy: ddp"):
        found.setup("fit")
    found.setup("test")


def test_each_clip_may_have_a_spatial_set():
    found = made(paths=ALWAYS, clips=2, rates={"spatial": 1e-4})
    assert found.rates == {"spatial-0": 1e-4, "spatial-1": 1e-4}
    second = {key: value[1:] for key, value in batch(2).items()}
    kinds, gradients = step(found, second)
    assert [kind for kind, _ in kinds] == ["appearance", "motion"]
    assert not any(".spatial-0." in name for name in gradients)
    assert any(".spatial-1." in name for name in gradients)
    kinds, gradients = step(found, batch(2))
    assert [kind for kind, _ in kinds] == ["appearance", "motion"] * 2
    assert all(p.grad is not None for n, p in found.model.named_parameters() if ".adapters." in n)
    with pytest.raises(ValueError, match="model.clips: 2"):
        step(found, batch(3))


def test_plans_of_the_modes():
    space, time, names = frozenset({"spatial"}), frozenset({"temporal"}), frozenset({"a", "b"})

    def planned(mode, frames=4, skipped=False):
        return plan(mode, "spatial", names, frames, skipped)

    of_frames = ("appearance", space, space)
    assert planned("dual") == [of_frames, ("motion", space | time, time)]
    assert planned("dual", skipped=True) == planned("temporal") == [("motion", time, time)]
    assert planned("second") == [("motion", space | time, time)]
    assert planned("spatial") == planned("dual", frames=1) == [of_frames]
    assert planned("single") == [("motion", names, names)]
    with pytest.raises(ValueError, match="one frame"):
        planned("temporal", frames=1)


def test_pictures_teach_appearance_alone():
    found = made()
    given = batch(2, frames=1)
    kinds, gradients = step(found, given)
    pictures = {"latents": given["latents"][:, 0], "captions": given["frame_captions"]}
    again, of_pictures = step(found, pictures)
    assert [kind for kind, _ in kinds] == ["appearance"]
    assert kinds == again
    assert gradients.keys() == of_pictures.keys()
    assert not any(".temporal." in name for name in gradients)


def test_kept_latents_and_texts_give_the_losses_of_videos_and_captions():
    found, given = made(paths=ALWAYS, caption_dropout=0.5), batch(3, latents=False)
    frames = {"captions": given["frame_captions"]}
    kept = given | {"text": found.conditions(given), "frame_text": found.conditions(frames)}
    kept["latents"] = found.latents({"videos": kept.pop("videos")})
    for (kind, value), (again, wanted) in zip(step(found, kept)[0], step(found, given)[0], strict=True):
        assert kind == again
        assert value == pytest.approx(wanted, rel=1e-5)


# --- options -----------------------------------------------------------------------------
def test_options_change_the_losses():
    given = batch(2)
    options = {
        "plain": {},
        "undebiased": {"paths": Paths("dual", debias=None, skip=0.0)},
        "beta": {"paths": Paths("dual", debias=0.5, skip=0.0)},
        "offset": {"noise": Noise(offset=0.1)},
        "huber": {"loss": Robust(kind="huber")},
        "snr": {"loss": Robust(snr_gamma=0.05)},
        "dropout": {"caption_dropout": 1.0},
    }
    values = {name: step(made(**({"paths": ALWAYS} | one)), given)[0][1][1] for name, one in options.items()}
    assert len(set(values.values())) == len(values), values
    beta_of_zero = step(made(paths=Paths("dual", debias=0.0, skip=0.0)), given)[0]
    assert beta_of_zero[1][1] == pytest.approx(2 * values["undebiased"], rel=1e-5)


def test_offset_noise_is_shared_by_the_frames():
    noise = dm.offset_noise(torch.zeros(2, 5, 4, 8, 8), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(noise, noise[:, :1, :, :1, :1].expand_as(noise))
    assert noise[:, 0, :, 0, 0].unique().numel() == 8


def test_wrong_sets_and_options_are_refused():
    for options, message in (
        ({"adapters": [va.Adaptation(va.LoRA(rank=1), ["attn1.to_q"])]}, "model.adapters"),
        ({"adapters": sets("spatial")}, "model.adapters"),
        ({"train": "all"}, "model.train"),
        ({"clips": 0}, "model.clips"),
        ({"strengths": {"space": 1.0}}, "model.strengths: no set is called 'space'"),
    ):
        with pytest.raises(ValueError, match=message):
            task(**options)
    for make in (lambda: Paths(debias=-1), lambda: Paths(skip=1.0), lambda: ClipPreview(image="a", clip="b")):
        with pytest.raises(ValueError, match="model"):
            make()


def test_validation_is_of_the_motion_alone_unless_strengths_say_otherwise():
    given, index = batch(2), torch.arange(2)
    found = made()
    alone = found.fixed_losses(given, index)
    assert {adapter.strength for adapter in va.adapters(found.model).values()} == {1.0}
    both = made(strengths={"spatial": 1.0}).fixed_losses(given, index)
    assert not torch.allclose(alone, both)
    for adapter in va.adapters(found.model, "spatial").values():
        nn.init.zeros_(adapter.up)
    assert torch.equal(found.fixed_losses(given, index), alone)


def test_groups_hold_one_set_each():
    found = made(rates={"spatial": 1e-4})
    owner = {id(p): a.name for a in va.adapters(found.model).values() for p in a.parameters()}
    groups = [({owner[id(p)] for p in group["params"]}, group["lr"]) for group in found.groups(1e-3, 0.0)]
    assert sorted(groups, key=lambda g: g[1]) == [({"spatial"}, 1e-4), ({"temporal"}, 1e-3)]


# --- runs --------------------------------------------------------------------------------
RUNS = {
    "bf16": {"backbone": {"base_dtype": "bfloat16", "grad_checkpointing": True}},
    "temporal": {"adapters": sets("spatial"), "train": "temporal"},
    "all": {"adapters": [], "train": "all", "paths": Paths("single", debias=None)},
}


@pytest.mark.parametrize("run", RUNS)
def test_runs_train_and_checkpoints_hold_what_trained(tmp_path, run):
    found = train(tmp_path, task=task(**RUNS[run]), data=ClipsData(4, batch_size=2), max_epochs=1)
    kept = torch.load(tmp_path / "last.ckpt")["state_dict"]
    fresh = task(**RUNS[run])
    fresh.configure_model()
    start, now = weights(fresh), weights(found)
    moved = {name for name in now if not torch.equal(now[name].float(), start[name].float())}
    assert moved <= {name.removeprefix("model.") for name in kept}
    adapted = {name for name in moved if ".adapters." in name}
    assert adapted if run != "all" else moved
    if run == "temporal":
        assert all("motion_modules" in name for name in moved - adapted)
        assert moved - adapted
    again = TextToVideo.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.paths == found.paths
    assert all(torch.equal(now[name], tensor) for name, tensor in weights(again).items())


def test_sequence_of_two_trains_appearance_first(tmp_path):
    seen = []
    found = task(paths=Paths("sequential", skip=0.0))
    passes = found._losses
    found._losses = lambda *a: [seen.append(one.kind) or one for one in passes(*a)]
    train(tmp_path, task=found, data=ClipsData(6, batch_size=2), max_epochs=2)
    assert seen == ["appearance"] * 3 + ["motion"] * 3


@pytest.mark.parametrize("batches", [2, 4])
def test_resume_is_exact(tmp_path, batches):
    """Frames, anchors and skipped steps go on where they stood."""

    def run(folder, *extra, **kwargs):
        one = task(caption_dropout=0.3, noise=Noise(offset=0.1), ema_decay=0.9, paths=Paths(skip=0.4), clips=6)
        return train(folder, *extra, task=one, data=ClipsData(6, batches == 2, batch_size=2), **kwargs)

    whole = run(tmp_path / "whole")
    with pytest.raises(Crash):
        run(tmp_path / "cut", CrashAt(batches))
    resumed = weights(run(tmp_path / "cut", resume=tmp_path / "cut" / "last.ckpt"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(whole).items())


# --- appearance and motion of different files ---------------------------------------------
def test_appearance_of_a_text_to_image_run_is_a_start(tmp_path):
    from tests.diffusion_training import task as picture_task

    pictures = picture_task(name=video_base(), adapters=sets("spatial"))
    pictures.configure_model()
    for adapter in va.adapters(pictures.model).values():
        nn.init.normal_(adapter.up)
    file = va.save(pictures.model, tmp_path / "style.safetensors")
    found = task(start=str(file))
    with pytest.warns(UserWarning, match="another base"):  # the motion modules are new
        found.configure_model()
    theirs, ours = va.adapters(pictures.model, "spatial"), va.adapters(found.model, "spatial")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[path].up, adapter.up) for path, adapter in ours.items())


def test_an_encoding_cache_keeps_whole_clips(tmp_path):
    found = made()
    cache = found.encoding_cache(tmp_path, 2**20)
    video = batch(1, latents=False)["videos"]
    assert torch.equal(cache.latents("k", video[0]), found.latents({"videos": video})[0])
    text = cache.text(["a", "b"])
    assert torch.allclose(text["embeddings"], found.conditions({"captions": ["a", "b"]})["embeddings"], atol=1e-5)
