"""A lean UNet: the stock UNet's names, predictions and gradients, with fewer bytes kept for backward."""

import copy

import pytest
import torch

import visadapt as va
from benchmarks import _counts
from tests.diffusion_training import base, batch, task
from visadapt.backbones import StableDiffusion
from visadapt.backbones.sd_text import encode_prompts

ALL = ["unet", "text.attention"]


def made(lean, layout="sd", targets=ALL, method=None, dtype=torch.float64, **options):
    model = StableDiffusion(base(layout), lean=lean, **options).build().to(dtype).train()
    torch.manual_seed(0)
    va.adapt(model, method or va.DoRA(rank=2), targets, lean=lean)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64).to(dtype) * 0.05)
    return model


def noisy(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator).to(dtype), torch.tensor([3, 700])


def gradients(model):
    text = encode_prompts(model, ["a red circle", "b"])
    found = model(*noisy(next(model.unet.parameters()).dtype), text)
    found.square().sum().backward()
    return found.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_names_predictions_and_gradients_are_those_of_the_stock_unet(layout):
    stock, lean = made(False, layout), made(True, layout)
    assert list(stock.state_dict()) == list(lean.state_dict())
    (y, grads), (y2, grads2) = gradients(stock), gradients(copy.deepcopy(lean))
    assert torch.equal(y, y2)
    for name, grad in grads.items():
        torch.testing.assert_close(grads2[name], grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(("method", "share"), [(va.LoRA(rank=2), 0.75), (va.DoRA(rank=2), 0.75)])
def test_fewer_bytes_are_kept(method, share):
    kept = []
    for lean in (False, True):
        model = made(lean, method=method, targets=["unet.attention"], dtype=torch.float32)
        with torch.no_grad():
            text = encode_prompts(model, ["a", "b"])
        inputs = (*noisy(torch.float32), text)
        kept.append(_counts.saved_bytes(lambda m=model, i=inputs: m(*i), model).kept)
    assert kept[1] < share * kept[0]


def test_checkpointing_decides_for_itself():
    stock, lean = made(False, grad_checkpointing=True), made(True, grad_checkpointing=True)
    (y, grads), (y2, grads2) = gradients(stock), gradients(lean)
    assert torch.equal(y, y2)
    assert all(torch.allclose(grads2[name], grad, rtol=1e-10, atol=1e-10) for name, grad in grads.items())


def test_full_fine_tuning_and_merging():
    models = [StableDiffusion(base(), lean=lean).build().double().train() for lean in (False, True)]
    for model in models:
        model.requires_grad_(False).unet.requires_grad_(True)
    (y, grads), (y2, grads2) = (gradients(model) for model in models)
    assert torch.equal(y, y2)
    assert all(torch.allclose(grads2[name], grad, rtol=1e-10, atol=1e-10) for name, grad in grads.items())
    adapted = made(True)
    with torch.no_grad():
        wanted = adapted(*noisy(), encode_prompts(adapted, ["a", "b"]))
        torch.testing.assert_close(va.merge(adapted)(*noisy(), encode_prompts(adapted, ["a", "b"])), wanted)


def test_the_task_adapts_lean_unless_told_otherwise():
    losses = []
    for options in ({}, {"lean": False}):
        run = task(targets=["unet.attention", "unet.convs"], backbone=options)
        run.configure_model()
        flags = {layer.lean for _, layer in va.core.model.grafted(run.model)}
        assert flags == {options.get("lean", True)}
        loss = run._training_loss(batch(), run.latents(batch()), torch.Generator().manual_seed(0))
        losses.append(loss.detach())
    assert torch.equal(*losses)
