"""PEFT folders by PEFT's own rules: what it wrote is read as it means it, or refused; ours mean one layer each."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visadapt as va
from tests.tiny import moved

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


class Net(nn.Module):
    """`fc1` ends the name `b.fc1`."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.fc1, self.b, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), Block(), nn.Linear(8, classes)

    def forward(self, x):
        x = self.emb(x) if x.dtype == torch.long else x
        return self.head(self.b(self.fc1(x).tanh()))


def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def stock(path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle: pip install 'visadapt[peft]'")
    return peft.PeftModel.from_pretrained(Net().eval(), str(path)).eval()


def made(path, base=None, **options):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle: pip install 'visadapt[peft]'")
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["fc1"]} | options
    model = peft.get_peft_model(base or Net(), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) / 5)
    model.save_pretrained(str(path))
    return model


def ours(path, targets=("fc1", "fc2")):
    model = moved(va.adapt(Net(), va.LoRA(rank=2), list(targets)))
    model.head.requires_grad_(True)
    va.export(model, path)
    return path


def refused(path, match, base=None):
    """One ValueError, and the model is as it was."""
    model = base or Net()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        va.load(model, path)
    assert str(path) in str(caught.value)
    assert not va.adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changed_the_base_is_refused(start, tmp_path):
    made(tmp_path, init_lora_weights=start)
    refused(tmp_path, "path_initial_model_for_weight_conversion")


def test_the_remedy_for_it_works(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle: pip install 'visadapt[peft]'")
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["fc1"], "init_lora_weights": "pissa"}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**options)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "pissa_start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) / 5)
    want = model(x())
    start = str(tmp_path / "pissa_start")
    model.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=start)
    torch.testing.assert_close(va.load(Net(), tmp_path / "out")(x()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_a_start_that_left_the_base_is_read(start, tmp_path):
    model = made(tmp_path, init_lora_weights=start)
    torch.testing.assert_close(va.load(Net(), tmp_path)(x()), model(x()))


@pytest.mark.parametrize("key", [r"b\.fc\d", "^fc1", "fc1", "b.*"])
def test_patterns_are_regular_expressions(key, tmp_path):
    model = made(tmp_path, target_modules=["fc1", "fc2"], alpha_pattern={key: 9}, rank_pattern={key: 3})
    torch.testing.assert_close(va.load(Net(), tmp_path)(x()), model(x()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bias": "all"}, r"base_layer\.bias' and \d more tensors have no counterpart here, \d in all"),
        ({"bias": "lora_only"}, r"fc1\.base_layer\.bias' and 1 more"),
        ({"target_modules": ["fc1", "emb"]}, "'emb.*no counterpart"),
        ({"trainable_token_indices": {"emb": [1, 2]}}, "'emb.*no counterpart"),
    ],
    ids=str,
)
def test_what_is_not_read_is_named(options, match, tmp_path):
    made(tmp_path, **options)
    refused(tmp_path, match)


def change(path, key=None, value=None, **config):
    held = load_file(path / TENSORS)
    if key is not None:
        name = next(k for k in held if k.endswith(key))
        held.pop(name)
        if value is not None:
            held[name] = value
    save_file(held, path / TENSORS)
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | config))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"key": "b.fc1.lora_B.weight"}, "lacks 'b.fc1.lora_B.weight'"),
        ({"key": "b.fc1.lora_A.weight"}, "'b.fc1.lora_B.weight' has no counterpart"),
        ({"key": "b.fc1.lora_A.weight", "value": torch.ones(2, 1)}, r"'b.fc1.lora_A.weight' is \(2, 1\) in the file"),
        ({"key": "b.fc2.lora_B.weight", "value": torch.ones(5, 2)}, r"'b.fc2.lora_B.weight' is \(5, 2\) in the file"),
        ({"key": "b.fc1.lora_A.weight", "value": torch.ones(4, 8)}, "is of rank 4, and adapter_config.json says 2"),
        ({"modules_to_save": ["top"]}, "'top' in modules_to_save is no module"),
        ({"key": "head.bias", "value": torch.ones(1)}, r"'head.bias' is \(1,\) in the file"),
    ],
)
def test_a_folder_that_does_not_fit_leaves_the_model(changes, match, tmp_path):
    change(ours(tmp_path / "peft"), **changes)
    refused(tmp_path / "peft", match)


def test_another_head_leaves_the_model(tmp_path):
    refused(ours(tmp_path / "peft"), r"'head.(bias|weight)' is \(3.*\(5", Net(5))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is damaged"),
        ("[]", "no JSON object"),
        ('{"peft_type": "LORA"}', "'lora_alpha' is null"),
        ('{"peft_type": "LOKR", "alpha": 2}', "'r' is null"),
        ('{"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": {"(": 2}}', "no regular expression"),
        ('{"peft_type": "LORA", "lora_alpha": 2, "rank_pattern": [2]}', "does not map"),
    ],
)
def test_a_broken_configuration_is_named(text, match, tmp_path):
    ours(tmp_path / "peft")
    (tmp_path / "peft" / CONFIG).write_text(text)
    refused(tmp_path / "peft", f"{CONFIG}.*{match}")


@pytest.mark.parametrize("method", [va.LoRA, va.DoRA, va.LoKr])
def test_a_name_that_ends_another_means_its_layer_alone(method, tmp_path):
    targets = {"re:fc1": {"rank": 2}, "b.fc1": {"rank": 4}}
    model = moved(va.adapt(Net(), method(), targets)).eval()
    va.export(model, tmp_path / "two")
    torch.testing.assert_close(stock(tmp_path / "two")(x()), model(x()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(va.load(Net(), tmp_path / "two")(x()), model(x()), rtol=1e-4, atol=1e-5)
    one = moved(va.adapt(Net(), method(), {"re:fc1": {"rank": 2}})).eval()
    va.export(one, tmp_path / "one")
    back = stock(tmp_path / "one")
    assert {n.split(".lo")[0] for n, _ in back.named_parameters() if "lora_" in n or "lokr_" in n} == {
        "base_model.model.fc1"
    }
    torch.testing.assert_close(back(x()), one(x()), rtol=1e-4, atol=1e-5)
    assert list(va.adapters(va.load(Net(), tmp_path / "one"))) == ["fc1.adapters.default"]


def test_a_part_that_does_not_fit_leaves_the_other_parts(base, tmp_path):
    model = moved(va.adapt(base(), va.LoRA(rank=2), ["unet.*.attn1.to_q", "text_encoder.*.v_proj"]))
    va.export(model, tmp_path)
    change(tmp_path / "text_encoder", "v_proj.lora_B.weight")
    fresh = base().requires_grad_(True)
    flags = {n: p.requires_grad for n, p in fresh.named_parameters()}
    with pytest.raises(ValueError, match=r"text_encoder' does not fit .*lacks .*v_proj.lora_B.weight"):
        va.load(fresh, tmp_path)
    assert not va.adapters(fresh)
    assert flags == {n: p.requires_grad for n, p in fresh.named_parameters()}
