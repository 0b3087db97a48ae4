from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt as va
from tests.tiny import FORMS, images, moved, tiny_vit


def stock(path):
    peft = pytest.importorskip("peft", reason="checks the file in stock PEFT: pip install 'visadapt[peft]'")
    return peft.PeftModel.from_pretrained(tiny_vit().eval(), str(path)).eval()


@pytest.mark.parametrize("targets", [["attn.qkv:q", "attn.qkv:v"], ["attention", "mlp", "patch_embed.proj"]], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_every_low_rank_form_is_exact_in_stock_peft(name, targets, tmp_path):
    model = moved(va.adapt(tiny_vit(), va.METHODS[name](), targets)).eval()
    assert va.export(model, tmp_path / "peft") == 0.0
    torch.testing.assert_close(stock(tmp_path / "peft")(images()), model(images()), rtol=1e-4, atol=1e-4)
    back = va.load(tiny_vit(), tmp_path / "peft").eval()
    torch.testing.assert_close(back(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_dora_is_peft_dora_and_comes_back(tmp_path):
    model = moved(va.adapt(tiny_vit(), va.DoRA(rank=3, alpha=6), ["attention", "patch_embed.proj"])).eval()
    va.export(model, tmp_path / "peft")
    torch.testing.assert_close(stock(tmp_path / "peft")(images()), model(images()), rtol=1e-4, atol=1e-5)
    back = va.load(tiny_vit(), tmp_path / "peft")
    assert {type(a) for a in va.adapters(back).values()} == {va.DoRA}
    torch.testing.assert_close(back.eval()(images()), model(images()))


def test_a_trained_head_travels(tmp_path):
    model = va.adapt(tiny_vit(), va.LoRA(rank=2), "attention")
    model.head.requires_grad_(True)
    with torch.no_grad():
        model.head.weight.mul_(2)
    model = moved(model).eval()
    va.export(model, tmp_path / "peft")
    torch.testing.assert_close(stock(tmp_path / "peft")(images()), model(images()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(va.load(tiny_vit(), tmp_path / "peft").eval()(images()), model(images()))


def test_what_is_not_low_rank_says_so_or_reports_the_error(tmp_path):
    model = moved(va.adapt(tiny_vit(), va.DoRA(rank=2), ["attn.qkv:q"]), 0.01)
    with pytest.raises(ValueError, match="no low-rank update; give `rank`"):
        va.export(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    errors = [va.export(model, tmp_path / "peft", rank=r) for r in (4, 16, 32)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_refusals(tmp_path):
    grouped = va.adapt(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), va.LoRA(rank=2), "0")
    with pytest.raises(ValueError, match="grouped or transposed convolution"):
        va.export(grouped, tmp_path / "a")
    with pytest.raises(ValueError, match="there is 'peft'"):
        va.export(grouped, tmp_path / "a", format="ckpt")
    with pytest.raises(FileNotFoundError, match="no PEFT folder: it has no adapter_config.json"):
        va.load(tiny_vit(), tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    model = va.adapt(tiny_vit(), va.LoRA(rank=2), "attention")
    with pytest.raises(ValueError, match="is not a PEFT folder; choose another output"):
        va.export(model, tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow  # PEFT imports transformers: 10 s on a busy machine
def test_loha_that_peft_made_is_read_and_its_cores_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")

    def host() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(2), nn.Linear(36, 12)).eval()

    options = {"target_modules": ["0", "2"], "init_weights": False, "r": 2, "alpha": 3}
    made = peft.get_peft_model(host(), peft.LoHaConfig(**options, rank_pattern={"2": 4}, alpha_pattern={"2": 5}))
    made.save_pretrained(tmp_path / "plain")
    x = torch.randn(2, 4, 6, 6)
    back = va.load(host(), tmp_path / "plain")
    assert {type(a) for a in va.adapters(back).values()} == {va.LoHa}
    torch.testing.assert_close(back(x), made(x), rtol=1e-4, atol=1e-5)
    cored = peft.get_peft_model(host(), peft.LoHaConfig(**options, use_effective_conv2d=True))
    cored.save_pretrained(tmp_path / "cores")
    with pytest.raises(ValueError, match=r"'0' holds .*hada_t1.*no whole LoHa without cores"):
        va.load(host(), tmp_path / "cores")
