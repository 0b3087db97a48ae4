"""Classification: what trains in each mode, the losses and metrics, and that the adapter alone holds the change."""

import lightning as L
import pytest
import torch
from torch import nn

import visadapt as va
from visadapt.backbones import TimmViT
from visadapt.data.digits import Digits
from visadapt.tasks.classification import Classification

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def random_base(**arguments):
    return TimmViT("vit_tiny_patch16_224", pretrained=False, img_size=32, options=TINY, **arguments)


def shipped(num_classes=10, **arguments):
    return built(TimmViT("tiny_digits"), num_classes, **arguments)


def built(backbone, num_classes=10, **arguments):
    task = Classification(backbone, num_classes, **arguments)
    task.configure_model()
    return task


def lora(**arguments):
    return va.Adaptation(va.LoRA(rank=2), "attention", **arguments)


def trained(task):
    return {name for name, p in task.model.named_parameters() if p.requires_grad}


def test_with_the_checkpoints_own_classes_only_the_adapter_trains():
    assert all(".adapters." in name for name in trained(shipped(adapters=[lora()])))


def test_with_other_classes_a_new_head_trains_too():
    names = trained(shipped(5, adapters=[lora()]))
    assert {name for name in names if ".adapters." not in name} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("head", "trains"), [("train", True), ("freeze", False)])
def test_the_head_can_be_chosen(head, trains):
    assert ("head.weight" in trained(shipped(adapters=[lora()], head=head))) is trains


def test_linear_probe_and_full_fine_tuning_need_no_adapter():
    assert trained(shipped(train="head")) == {"head.weight", "head.bias"}
    task = shipped(train="all")
    assert trained(task) == {name for name, _ in task.model.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": "head", "head": "freeze"}, r"model\.train: head contradicts"),
        ({"adapters": [lora()], "head": "freeze", "num_classes": 3}, r"model\.head: freeze, but"),
        ({"num_classes": 1}, r"model\.num_classes: 1"),
        ({"mixup": -1.0}, r"must not be negative"),
    ],
)
def test_contradictions_have_one_clear_message(arguments, message):
    with pytest.raises(ValueError, match=message):
        shipped(**arguments)


def test_nothing_to_train_is_said_before_training_and_is_fine_for_prediction():
    task, data = Classification(TimmViT("tiny_digits"), 10), Digits(shots=1)
    quiet_trainer().test(task, data, verbose=False)
    with pytest.raises(ValueError, match=r"nothing to train: give model\.adapters"):
        quiet_trainer(max_steps=1).fit(task, data)


def test_data_with_other_names_gets_a_new_head():
    backbone = TimmViT("tiny_digits")
    task = Classification(backbone, 10, adapters=[lora()])
    data = Digits(classes=list(reversed(range(10))), shots=1)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(task, data)
    assert backbone.new_head
    assert "head.weight" in trained(task)


def quiet_trainer(**arguments):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        **arguments,
    )


def test_training_changes_the_adapter_alone_and_lowers_the_loss():
    torch.manual_seed(0)
    sets = [va.Adaptation(va.LoRA(rank=4, alpha=16), "all")]
    task = shipped(adapters=sets, optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3, weight_decay=0.1))
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    data = Digits("inverted", shots=4, batch_size=40)
    data.transform = task.preprocess(train=False)
    images, labels = next(iter(data.train_dataloader()))
    task.eval()
    with torch.no_grad():
        first, base = task.criterion(task(images), labels), task(images)
    quiet_trainer(max_epochs=20).fit(task.train(), data)
    task.eval()
    with torch.no_grad(), va.strength(task.model, 0.0):
        assert torch.equal(task(images), base)
    with torch.no_grad():
        assert task.criterion(task(images), labels) < 0.6 * first
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".adapters." in name for name in changed)


def test_label_smoothing_is_for_training_only():
    task = built(random_base(), 3, train="all", label_smoothing=0.3)
    output, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    plain = nn.functional.cross_entropy(output, target)
    assert not torch.allclose(task.train().criterion(output, target), plain)
    assert torch.allclose(task.eval().criterion(output, target), plain)


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_gives_shares_of_classes(mixing):
    torch.manual_seed(0)
    task = Classification(random_base(), 4, train="all", **mixing)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    mixed, shares = task._mix(images, labels)
    assert not torch.equal(mixed, images)
    assert shares.shape == (8, 4)
    assert torch.allclose(shares.sum(1), torch.ones(8))
    assert ((shares > 0).sum(1) == 2).any()
    assert torch.isfinite(task.criterion(torch.randn(8, 4), shares))


def test_metrics_against_figures_worked_out_by_hand():
    metrics = Classification(random_base(), 6, train="all").metrics()
    scores = torch.eye(6)[[0, 1, 1, 5]] * 50
    scores[:, 3] = -50  # the class left out of the best five
    found = metrics(scores, torch.tensor([0, 1, 3, 5]))
    assert found["accuracy"] == 0.75
    assert found["accuracy_top5"] == 0.75
    assert found["class_mean_accuracy"] == 0.75  # 1, 1, 0 and 1 of the four classes that occur
    assert found["calibration_error"] == pytest.approx(0.25, abs=1e-4)  # always sure, right in three of four
    assert "accuracy_top5" not in Classification(random_base(), 5, train="all").metrics()


def test_accuracy_of_every_class_is_logged_by_the_test():
    data = Digits("upright", classes=[3, 8], batch_size=100)
    task = built(random_base(), 2, train="all")
    (found,) = quiet_trainer().test(task, data, verbose=False)
    assert {"test/accuracy_of/3", "test/accuracy_of/8"} <= set(found)
    mean = (found["test/accuracy_of/3"] + found["test/accuracy_of/8"]) / 2
    assert mean == pytest.approx(found["test/class_mean_accuracy"], abs=1e-6)


@pytest.mark.parametrize("saving", [{"grad_checkpointing": True}, {"lean": True}])
def test_memory_options_change_no_gradient(saving):
    def gradients(**options):
        torch.manual_seed(0)
        task = shipped(adapters=[va.Adaptation(va.LoRA(rank=2), "all")], **options)
        for adapter in va.adapters(task.model).values():
            nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(1))
        task.train()
        task.model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).square().sum().backward()
        return {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}

    plain, saved = gradients(), gradients(**saving)
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, saved[name], rtol=1e-4, atol=1e-5 * gradient.abs().max()), name


def test_gradient_checkpointing_is_refused_where_there_is_none():
    class Plain(TimmViT):
        def build(self, num_classes=None, class_names=None):
            return nn.Linear(4, num_classes)

    with pytest.raises(ValueError, match="Linear has no gradient checkpointing"):
        built(Plain(), 3, train="all", grad_checkpointing=True)


def test_compile_keeps_every_name():
    plain, compiled = shipped(train="all"), shipped(train="all", compile=True)
    assert compiled.model._compiled_call_impl is not None
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_the_shipped_base_has_the_accuracy_that_its_recipe_states():
    import json
    from pathlib import Path

    import visadapt.backbones

    recipe = json.loads((Path(visadapt.backbones.__file__).parent / "tiny" / "tiny_digits.json").read_text())
    task = shipped(train="head")
    for domain in ("upright", "inverted"):
        data = Digits(domain, source_domain=None, batch_size=250)
        (found,) = quiet_trainer().test(task, data, verbose=False)
        assert found["test/accuracy"] == pytest.approx(recipe["test_accuracy"][domain], abs=0.004)
    assert recipe["test_accuracy"]["upright"] > 0.93


def test_own_images_are_learnt_from_folders(tmp_path):
    from PIL import Image

    from visadapt.data.image_folder import ImageFolder

    for name, hue in {"night": 40, "day": 200}.items():
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB", (40 + i, 50), (hue, hue - i, hue)).save(tmp_path / name / f"{i}.jpg")
    L.seed_everything(0)
    task = Classification(
        TimmViT("tiny_digits"), 2, [lora()], optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    )
    data = ImageFolder(str(tmp_path), split=[0.5, 0.0, 0.5], batch_size=12)
    trainer = quiet_trainer(max_epochs=8)
    trainer.fit(task, data)
    (found,) = trainer.test(task, data, verbose=False)
    assert found["test/accuracy"] == 1.0
    assert torch.cat(trainer.predict(task, data)).shape == (12, 2)
