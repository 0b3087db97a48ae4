"""Text-to-image: each option changes what it should and nothing else, resume is exact, files hold what trained."""

import pytest
import torch
from torch import nn

import visadapt as va
from tests.diffusion_training import PictureData, Pictures, batch, task, train
from tests.training import Crash, CrashAt, weights
from visadapt.backbones import sd_tokens
from visadapt.backbones.sd_tokens import ExtendedEmbedding, NewToken
from visadapt.core.state import read
from visadapt.tasks.diffusion_options import Loss, Noise, Preview
from visadapt.tasks.text_to_image import TextToImage

pytestmark = pytest.mark.usefixtures("one_thread")


def made(*args, **kwargs):
    found = task(*args, **kwargs)
    found.configure_model()
    return found


def loss(found, given, seed=0):
    """The training loss with the draws of a seed."""
    return found._training_loss(given, found.latents(given), torch.Generator().manual_seed(seed))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- losses and options ------------------------------------------------------------------
def test_the_default_is_the_plain_loss_of_the_papers():
    """Against diffusers' scheduler and UNet, with the same draws."""
    found, given = made(), batch(2)
    generator = torch.Generator().manual_seed(0)
    steps = (torch.rand(2, generator=generator, dtype=torch.float64) * 1000).long()
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    model = found.model
    text = model.text_encoder(
        model.tokenizer(given["captions"], padding="max_length", return_tensors="pt").input_ids
    ).last_hidden_state
    noisy = model.scheduler.add_noise(given["latents"], noise, steps)
    wanted = (model.unet(noisy, steps, text).sample - noise).square().mean()
    assert torch.allclose(loss(found, given), wanted, rtol=1e-5)


OPTIONS = {
    "offset": {"noise": Noise(offset=0.1)},
    "perturbation": {"noise": Noise(perturbation=0.1)},
    "sampling": {"noise": Noise(sampling="logit_normal")},
    "cubic": {"noise": Noise(sampling="cubic")},
    "range": {"noise": Noise(t_min=0.9)},
    "huber": {"loss": Loss(kind="huber")},
    "smooth l1": {"loss": Loss(kind="smooth_l1", width_schedule="snr")},
    "snr": {"loss": Loss(snr_gamma=0.05)},
    "dropout": {"caption_dropout": 1.0},
    "v": {"backbone": {"prediction": "v_prediction"}},
    "flow": {"backbone": {"prediction": "flow"}},
    "zero snr": {"backbone": {"prediction": "v_prediction", "zero_snr": True}},
}


def test_options_change_the_training_loss():
    given = batch(2)
    plain = made()
    values = {name: loss(made(**options), given).item() for name, options in OPTIONS.items()}
    values["plain"] = loss(plain, given).item()
    assert len(set(values.values())) == len(values), values
    assert loss(made(noise=Noise(), loss=Loss(), preview=Preview(seeds=[3])), given).item() == values["plain"]
    assert loss(made(loss=Loss(prior_weight=0.1)), given).item() == values["plain"]  # no class images here
    assert loss(plain, given, seed=1).item() != values["plain"]


def test_masks_and_class_images_of_a_batch():
    found = made(loss=Loss(prior_weight=0.0))
    whole = loss(found, batch(2))
    mask = torch.ones(2, 1, 32, 32)
    assert torch.allclose(loss(found, batch(2, masks=mask)), whole)
    mask[:, :, :16] = 0
    assert not torch.allclose(loss(found, batch(2, masks=mask)), whole)
    prior = torch.tensor([False, True])
    one = loss(found, batch(2, prior=prior))
    assert not torch.allclose(one, whole)
    given = batch(2, prior=prior)
    given["latents"][1] += 1  # a class image of weight 0 does not matter
    assert torch.allclose(loss(found, given), one)


def test_images_are_encoded_and_latents_are_not():
    found, images = made(), batch(2, latents=False)
    latents = found.latents(images)
    without = {key: value for key, value in images.items() if key != "images"} | {"latents": latents}
    assert torch.equal(loss(found, images), loss(found, without))
    found.model.vae.forward = found.model.vae.encode = None  # type: ignore[assignment]
    loss(found, without)


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_cached_text_is_what_captions_give_dropped_or_not(layout):
    found, given = made(layout, caption_dropout=0.5), batch(4)
    cached = given | {"text": found.conditions(given)}
    for seed in range(3):
        assert torch.allclose(loss(found, cached, seed), loss(found, given, seed), rtol=1e-5)
    found.model.text_encoder.forward = None  # the empty caption is known by now
    assert loss(found, cached, 0).isfinite()


def test_cached_text_with_a_text_encoder_that_trains_is_refused():
    found, given = made(targets=["text.attention"]), batch(1)
    with pytest.raises(ValueError, match=r"data\.cache"):
        loss(found, given | {"text": found.conditions(given)})


def test_sizes_matter_to_sdxl_only():
    sizes = torch.tensor([[64, 64, 8, 8, 32, 32]]).expand(2, -1)
    for layout, matter in (("sd", False), ("sdxl", True)):
        found = made(layout)
        assert (loss(found, batch(2)) != loss(found, batch(2, sizes=sizes))) == matter


def test_wrong_options_are_refused():
    for options, key in (({"caption_dropout": 2}, "caption_dropout"), ({"val_times": 0}, "val_times")):
        with pytest.raises(ValueError, match=f"model.{key}"):
            task(**options)
    for make in (
        lambda: Noise(t_min=1.0),
        lambda: Loss(width=0),
        lambda: Loss(snr_gamma=-1),
        lambda: Preview(seeds=[]),
    ):
        with pytest.raises(ValueError, match="model"):
            make()


# --- validation --------------------------------------------------------------------------
def test_validation_losses_are_fixed_and_of_each_sample():
    found, given = made(noise=Noise(offset=0.5), loss=Loss(kind="huber"), caption_dropout=1.0), batch(3)
    plain = made()
    index = torch.arange(3)
    losses = found.fixed_losses(given, index)
    assert torch.equal(losses, found.fixed_losses(given, index))
    assert torch.allclose(losses, plain.fixed_losses(given, index))  # options of training play no part
    last = {key: value[2:] for key, value in given.items()}
    assert torch.allclose(found.fixed_losses(last, index[2:]), losses[2:], rtol=1e-4)
    assert not torch.allclose(found.fixed_losses(last, index[:1]), losses[2:], rtol=1e-3)


def test_validation_does_not_depend_on_batches(tmp_path):
    values = []
    for size in (1, 3):
        found = train(tmp_path, task=task(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), max_epochs=1,
                      data=PictureData(2, batch_size=size), limit_train_batches=1)  # fmt: skip
        values.append(found.trainer.callback_metrics["val/loss"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)


# --- training ----------------------------------------------------------------------------
RUNS = {
    "sdxl": {"layout": "sdxl", "targets": ["unet.cross", "text"]},
    "bf16": {"backbone": {"base_dtype": "bfloat16", "grad_checkpointing": True}, "targets": ["unet.convs", "text"]},
    "unet": {"adapters": [], "train": "unet"},
    "all": {"adapters": [], "train": "all"},
    "ema": {"ema_decay": 0.9},
}


@pytest.mark.parametrize("run", RUNS)
def test_runs_train_and_files_hold_what_trained(tmp_path, run):
    found = train(tmp_path, task=task(**RUNS[run]), max_epochs=1)
    kept = torch.load(tmp_path / "last.ckpt")["state_dict"]
    trained = {name for name, p in found.named_parameters() if p.requires_grad}
    assert trained
    assert trained <= set(kept)
    if run in ("unet", "all"):
        whole = ("unet.", "text_encoder") if run == "all" else ("unet.",)
        assert set(kept) == {f"model.{name}" for name, _ in found.model.named_parameters() if name.startswith(whole)}
    else:
        assert all(".adapters." in name for name in kept)
    fresh = task(**RUNS[run])
    fresh.configure_model()
    start = weights(fresh)
    moved = {n for n, t in weights(found).items() if not torch.equal(t.float(), start[n].float())}
    assert moved
    assert moved <= {name.removeprefix("model.") for name in trained}
    assert found.trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("batches", [2, 4])
def test_resume_is_exact(tmp_path, batches, latents):
    """Noise, times and dropped captions go on where they stood, with latents of a cache or pictures."""

    def one():
        return task(caption_dropout=0.3, noise=Noise(offset=0.1), tokens=[NewToken("<x>", "no")], ema_decay=0.9)

    def data():
        return PictureData(6, latents, batch_size=2)

    whole = train(tmp_path / "whole", task=one(), data=data())
    with pytest.raises(Crash):
        train(tmp_path / "cut", CrashAt(batches), task=one(), data=data())
    resumed = train(tmp_path / "cut", task=one(), data=data(), resume=tmp_path / "cut" / "last.ckpt")
    assert same(weights(whole), weights(resumed))


def test_noise_is_a_function_of_the_position_alone(tmp_path):
    """The global random state, which adapters' dropout draws from, plays no part."""
    results = []
    for number in (0, 1):
        found = task()
        found.on_train_batch_start = lambda *a, number=number: torch.manual_seed(number)
        results.append(weights(train(tmp_path, task=found, max_epochs=1)))
    assert same(*results)


def test_rates_by_part_and_by_set():
    lora = va.LoRA(rank=1)
    sets = [va.Adaptation(lora, ["unet.cross"]), va.Adaptation(lora, ["unet.ff"], "slow"),
            va.Adaptation(lora, ["text.attention"])]  # fmt: skip
    found = made(adapters=sets, rates={"text_encoder": 1e-4, "slow": 1e-5})
    groups = va.parameter_groups(found.model, 1e-3, rates=found.rates)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in found.model.named_parameters():
        if parameter.requires_grad:
            wanted = 1e-4 if name.startswith("text_encoder") else 1e-5 if ".slow." in name else 1e-3
            assert rates[id(parameter)] == wanted, name
    with pytest.raises(ValueError, match="'vae'"):
        va.parameter_groups(found.model, 1e-3, rates={"vae": 1.0})


# --- new tokens --------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_new_tokens_train_beside_adapters_and_the_table_stays(tmp_path, layout):
    class Named(PictureData):
        def collate(self, samples):
            given = super().collate(samples)
            return given | {"captions": [f"a <x> {caption}" for caption in given["captions"]]}

    tokens = [NewToken("<x>", "no", vectors=2), NewToken("<y>")]
    found = train(tmp_path, task=task(layout, tokens=tokens), data=Named(4, batch_size=2), max_epochs=1)
    start = made(layout, tokens=tokens)
    tables = sd_tokens.extended(found.model)
    assert len(tables) == (2 if layout == "sdxl" else 1)
    for table, before in zip(tables, sd_tokens.extended(start.model), strict=True):
        assert torch.equal(table.weight, before.weight)
        changed = (table.new_tokens != before.new_tokens).any(1)
        assert changed[:2].all()
    kept = {name for name in torch.load(tmp_path / "last.ckpt")["state_dict"] if ".adapters." not in name}
    assert all(name.endswith("token_embedding.new_tokens") for name in kept)
    assert found.base == made(layout).base  # the base is the same without them

    path = va.save(found.model, tmp_path / "a.safetensors", extra=found.adapter_metadata())
    assert any(key.endswith("new_tokens") for key in read(path)[1])
    model = sd_tokens.load_adapter(made(layout, adapters=[]).model, path)
    found.preview = Preview(steps=1, seeds=[0])
    again = task(layout, adapters=[], preview=found.preview)
    again.model = model
    assert torch.equal(found.render(["a <x>"], [0]), again.render(["a <x>"], [0]))
    assert not torch.equal(found.render(["a <x>"], [0]), found.render(["a <y>"], [0]))


def test_exported_embeddings_load_in_the_stock_pipeline(tmp_path):
    from visadapt.backbones.stable_diffusion import pipeline

    found = made(adapters=[], tokens=[NewToken("<x>", "no", vectors=2)])
    with torch.no_grad():
        for table in sd_tokens.extended(found.model):
            table.new_tokens.normal_()
    wanted = found.render(["a <x> b"], [0])
    [file] = sd_tokens.export_tokens(found.model, tmp_path)
    fresh = made(adapters=[])
    stock = pipeline(fresh.model)
    stock.load_textual_inversion(str(tmp_path), weight_name=file.name, token="<x>")
    assert torch.equal(fresh.render(["a <x> b"], [0]), wanted)
    sd_tokens.bake_tokens(found.model)
    assert not any(isinstance(m, ExtendedEmbedding) for m in found.model.modules())
    assert torch.equal(found.render(["a <x> b"], [0]), wanted)
    pipeline(found.model).save_pretrained(tmp_path / "merged")
    saved = TextToImage(type(found.backbone)(str(tmp_path / "merged")), preview=found.preview)
    saved.configure_model()
    assert torch.equal(saved.render(["a <x> b"], [0]), wanted)


def test_tokens_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="knows 'a'"):
        made(tokens=[NewToken("a")])
    with pytest.raises(ValueError, match="once"):
        made(tokens=[NewToken("<x>"), NewToken("<x>")])
    with pytest.raises(ValueError, match="one word"):
        NewToken("two words")


# --- with the data modules ---------------------------------------------------------------
def test_an_encoding_cache_gives_latents_and_text(tmp_path):
    found = made()
    cache = found.encoding_cache(tmp_path, 2**20)
    image = Pictures(1, latents=False)[0]["images"]
    assert torch.equal(cache.latents("k", image), found.latents({"images": image[None]})[0])
    text = cache.text(["a", "b"])
    assert torch.allclose(text["embeddings"], found.conditions({"captions": ["a", "b"]})["embeddings"], atol=1e-5)
    assert made(targets=["text.mlp"]).encoding_cache(tmp_path, 2**20).text(["a"]) is None


def test_class_images_are_rendered_by_the_base(tmp_path):
    from visadapt.data.class_images import ClassImages

    data = PictureData(2, batch_size=2)
    data.class_images = ClassImages(tmp_path / "class", "a thing", 2)
    train(tmp_path / "a", task=task(), data=data, max_epochs=1)
    first = [path.read_bytes() for path in data.class_images.paths()]
    assert len(first) == 2
    assert first[0] != first[1]
    data.class_images.paths()[1].unlink()
    moved = made()
    for adapter in va.adapters(moved.model).values():
        nn.init.normal_(adapter.up)
    train(tmp_path / "b", task=moved, data=data, max_epochs=1)
    assert [path.read_bytes() for path in data.class_images.paths()] == first


def test_predicting_renders_the_captions():
    found = made()
    assert torch.equal(found.predict_step({"captions": ["a"]}, 0), found.render(["a"], [0]))


def test_a_checkpoint_rebuilds_the_task(tmp_path):
    options = {"tokens": [NewToken("<x>", "no")], "noise": Noise(offset=0.1), "loss": Loss(kind="huber")}
    found = train(tmp_path, task=task(**options, optimizer=torch.optim.AdamW), max_epochs=1)
    again = TextToImage.load_from_checkpoint(tmp_path / "last.ckpt")
    assert (again.noise, again.loss, again.tokens) == (found.noise, found.loss, found.tokens)
    assert same(weights(again), weights(found))


# --- content and style apart -------------------------------------------------------------
def test_auxiliary_pictures_train_one_factor_and_the_others_the_other():
    """Each gradient is that of its own pictures alone; the loss is what it is without."""
    sets = [va.Adaptation(va.B4M(rank=4), ["unet.cross"])]
    prior = torch.tensor([False, True, False])
    options = {"adapters": sets, "loss": Loss(auxiliary="up")}

    def gradients(weight=None, **given):
        found = made(**{**options, **given})
        with torch.no_grad():
            for adapter in va.adapters(found.model).values():
                adapter.up.normal_(generator=torch.Generator().manual_seed(1))
        found.loss.prior_weight = 1.0 if weight is None else weight
        value = loss(found, batch(3, prior=prior))
        value.backward()
        return value.detach(), {n: p.grad for n, p in found.model.named_parameters() if p.requires_grad}

    value, apart = gradients()
    plain, _ = gradients(loss=Loss())
    assert torch.allclose(value, plain, rtol=1e-5)
    _, content = gradients(0.0, loss=Loss())  # without the auxiliary pictures
    _, both = gradients(loss=Loss())
    for name, gradient in apart.items():
        wanted = both[name] - content[name] if name.endswith("up") else content[name]
        assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-6), name
    with pytest.raises(ValueError, match="grad_checkpointing"):
        made(**options, backbone={"grad_checkpointing": True})
