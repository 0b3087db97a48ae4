"""A motion adapter that brings a text encoder of its own."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_video import video_base
from visadapt.backbones import VideoDiffusion
from visadapt.backbones.video_text import encode_prompts


def test_a_motion_adapter_may_bring_a_text_encoder(tmp_path):
    base = Path(video_base("animatediff"))
    shutil.copytree(base / "motion_adapter", tmp_path / "motion")
    before = VideoDiffusion(str(base), motion_adapter=str(tmp_path / "motion")).build()
    shutil.copytree(base / "text_encoder", tmp_path / "motion" / "text_encoder")
    file = tmp_path / "motion" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    table = next(tensor for name, tensor in tensors.items() if name.endswith("token_embedding.weight"))
    moved = before.tokenizer("m", add_special_tokens=False).input_ids[0]
    table[moved] += 1
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file, {"format": "pt"})
    found = VideoDiffusion(str(base), motion_adapter=str(tmp_path / "motion")).build()
    assert {parameter.dtype for parameter in found.text_encoder.parameters()} == {torch.float32}
    row = found.text_encoder.get_input_embeddings().weight[moved]
    assert torch.allclose(row, before.text_encoder.get_input_embeddings().weight[moved] + 1, atol=1e-3)
    texts = [encode_prompts(model, ["m"])["embeddings"] for model in (found, before)]
    assert not torch.allclose(*texts, atol=1e-2)
    for one, other in zip(found.unet.parameters(), before.unet.parameters(), strict=True):
        assert torch.equal(one, other)
