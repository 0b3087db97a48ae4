"""File commands on real files of each kind."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visadapt as va
from visadapt.cli.errors import UserError
from visadapt.cli.inspect import describe
from visadapt.cli.main import main
from visadapt.methods import METHODS

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights of a base, and a configuration that names them."""
    import yaml

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    save_file(model.state_dict(), folder / "base.safetensors")
    options = {k: v for k, v in OPTIONS.items() if k not in ("img_size", "num_classes")}
    init = {"name": "vit_tiny_patch16_224", "checkpoint": str(folder / "base.safetensors"), "img_size": 32}
    recipe = {"class_path": "TimmViT", "init_args": {**init, "options": options}}
    text = yaml.safe_dump({"model": {"class_path": "Classification", "init_args": {"backbone": recipe}}})
    (folder / "base.yaml").write_text(text)
    return folder


def adapted(base, method=None):
    """The base with adapters away from their start."""
    model = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    model.load_state_dict(load_file(base / "base.safetensors"))
    va.adapt(model, method or va.LoRA(rank=3), ["attn.qkv:v", "mlp.fc1"])
    torch.manual_seed(2)
    with torch.no_grad():
        for adapter in va.adapters(model).values():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def adapter(base, here):
    model = adapted(base)
    va.save(model, "adapter.safetensors", base_name="vit_tiny_patch16_224")
    return model


def test_merge_writes_what_stock_timm_loads(adapter, base, here, capsys):
    assert main(["merge", "adapter.safetensors", "--config", str(base / "base.yaml"), "--output", "m.safetensors"]) == 0
    assert "m.safetensors" in capsys.readouterr().out
    stock = timm.create_model("vit_tiny_patch16_224", **OPTIONS, checkpoint_path="m.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-5)


def test_export_and_import_are_inverse(adapter, base, here, capsys):
    config = ["--config", str(base / "base.yaml")]
    assert main(["export", "adapter.safetensors", "--output", "peft", *config]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["import", "peft", "--output", "back.safetensors", *config]) == 0
    model = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    model.load_state_dict(load_file(base / "base.safetensors"))
    va.load(model, "back.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-5)


def test_export_loads_in_peft(adapter, base, here):
    peft = pytest.importorskip("peft")
    assert main(["export", "adapter.safetensors", "--output", "peft", "--config", str(base / "base.yaml")]) == 0
    model = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    model.load_state_dict(load_file(base / "base.safetensors"))
    model = peft.PeftModel.from_pretrained(model, "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), adapter(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_missing_base_is_asked_for_by_the_name_in_the_file(adapter, here, capsys):
    assert main(["merge", "adapter.safetensors"]) == 2
    assert "add --backbone vit_tiny_patch16_224" in capsys.readouterr().err


def test_inspect_an_adapter_of_visadapt(adapter, here, capsys):
    assert main(["inspect", "adapter.safetensors"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("visadapt adapter", "vit_tiny_patch16_224", "rank=3", "blocks.*.mlp.fc1", "3×32", "F32"):
        assert part in text, part
    assert main(["inspect", "adapter.safetensors", "--norms=true"]) == 0
    name = "blocks.0.mlp.fc1.adapters.default.up"
    norm = float(load_file("adapter.safetensors")[name].norm())
    assert f"{norm:.4g}" in capsys.readouterr().out


def test_inspect_knows_other_formats(adapter, base, here):
    va.export(adapter, "peft")
    found = describe(here / "peft")
    assert found.kind == "PEFT folder"
    assert dict(found.facts)["method"] == "LORA"
    kohya = {
        "lora_unet_mid_block_attn_to_q.lora_down.weight": torch.zeros(4, 8),
        "lora_unet_mid_block_attn_to_q.lora_up.weight": torch.zeros(8, 4),
        "lora_unet_mid_block_attn_to_q.alpha": torch.tensor(4.0),
    }
    save_file(kohya, "kohya.safetensors", metadata={"ss_network_dim": "4"})
    found = describe(here / "kohya.safetensors")
    assert found.kind.startswith("kohya")
    assert {("method", "LoRA"), ("rank", "4"), ("modules", "1"), ("ss_network_dim", "4")} <= set(found.facts)
    save_file({"a.hada_w1_a": torch.zeros(2, 2), "lycoris_a.hada_w1_b": torch.zeros(2, 2)}, "loha.safetensors")
    assert dict(describe(here / "loha.safetensors").facts)["method"] == "LoHa"
    diffusers = {"unet.a.to_q.lora_A.weight": torch.zeros(4, 8), "unet.a.to_q.lora_magnitude_vector": torch.zeros(8)}
    save_file(diffusers, "d.safetensors")
    found = describe(here / "d.safetensors")
    assert found.kind == "diffusers adapter"
    assert dict(found.facts)["method"] == "DoRA"
    assert describe(base / "base.safetensors").kind.startswith("plain weights")


def test_inspect_a_checkpoint(here):
    torch.save({"state_dict": {"a": torch.zeros(3)}, "global_step": 5, "epoch": 1}, "x.ckpt")
    found = describe(here / "x.ckpt")
    assert found.kind.startswith("training checkpoint")
    assert ("training state", "epoch 1, step 5") in found.facts


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cut off"), (b"garbage" * 20, "not a safetensors file"), ("half", "cut off"), ("header", "header")],
)
def test_broken_files_are_told(content, message, adapter, here, capsys):
    whole = (here / "adapter.safetensors").read_bytes()
    if content == "half":
        content = whole[: len(whole) - 100]
    elif content == "header":
        content = whole[:8] + b"?" + whole[9:]
    (here / "broken.safetensors").write_bytes(content)
    assert main(["inspect", "broken.safetensors"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "visadapt inspect: error at 'broken.safetensors'"
    assert message in lines[1]


def test_a_pickle_is_not_run(here, capsys):
    class Evil:
        def __reduce__(self):
            return (open, ("ran.txt", "w"))

    torch.save({"x": Evil()}, "evil.pt")
    assert main(["inspect", "evil.pt"]) == 2
    assert not (here / "ran.txt").exists()


def test_wrong_options_of_a_tool_are_explained(adapter, here, capsys):
    with pytest.raises(SystemExit) as left:
        main(["merge", "adapter.safetensors", "--outptu", "x"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("visadapt merge: error at 'outptu'")
    assert "did you mean: output?" in error
    assert main(["inspect", "adaptor.safetensors"]) == 2
    assert "did you mean: adapter.safetensors?" in capsys.readouterr().err


def test_methods_prints_the_catalogue(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in METHODS)
    assert "2106.09685" in text


def test_the_catalogue_is_complete():
    from visadapt.cli.catalogue import entries

    for entry in entries():
        assert entry.equation, entry
        assert "Linear" in entry.layers, entry
        assert entry.source, entry
    found = {e.name: e for e in entries()}
    assert found["LoRA"].export == "exact"
    assert found["LoRA"].merges


def test_check_prints_the_grid(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", "--methods", "SSF"]) == 0
    text = capsys.readouterr().out
    assert "SSF" in text
    assert " 0 fail" in text
    assert main(["check", "--methods", "LoRa"]) == 2
    assert "did you mean: LoRA?" in capsys.readouterr().err


def test_the_metadata_is_plain_json(adapter, here):
    from safetensors import safe_open

    with safe_open("adapter.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["visadapt"])["sets"][0]["hparams"]["rank"] == 3


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": {"dtype": "F32", "shape": [1]}},
        {"__metadata__": {"visadapt": "no JSON"}},
        {"__metadata__": {"visadapt": "{}"}},
        {"__metadata__": {"visadapt": "[1]"}},
    ],
    ids=["a list", "no offsets", "no JSON", "no sets", "a list of sets"],
)
def test_inspect_tells_of_a_broken_file(tmp_path, header):
    said = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(said).to_bytes(8, "little") + said)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        describe(path)


@pytest.mark.parametrize("text", ["[]", "{", "1"])
def test_inspect_tells_of_a_broken_peft_folder(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="broken"):
        describe(tmp_path)
