"""Figures of features against float64 references written out from their formulas; extractors and CLIP from files."""

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from safetensors.torch import save

from tests.tiny_diffusion import tokenizer
from visadapt.metrics import renders
from visadapt.metrics.adherence import Judge
from visadapt.metrics.clip import clip_score, load_clip
from visadapt.metrics.features import Extractor, FeatureNet


def features(count, seed, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


def mmd(found, real):
    n, m = len(found), len(real)
    within = sum(kernel(found[i], found[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    among = sum(kernel(real[i], real[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + among - 2 * sum(kernel(a, b) for a in found for b in real) / (n * m)


def test_kid_is_the_unbiased_estimate_of_the_formula():
    found, real = features(7, 0), features(7, 1) + 1
    assert renders.kid(found, real) == pytest.approx(mmd(found, real), rel=1e-9)


def test_kid_of_unequal_sets_is_fixed_near_the_estimate_and_leaves_random_numbers_alone():
    found, real = features(12, 0), features(40, 1) + 1
    state = torch.get_rng_state()
    value = renders.kid(found, real)
    assert torch.equal(torch.get_rng_state(), state)
    assert value == renders.kid(found, real)
    assert value == pytest.approx(mmd(found, real), rel=0.2)


def test_fid_is_the_distance_of_two_normal_laws():
    found, real = features(30, 0), 2 * features(20, 1) + 0.5
    a, b = np.cov(found.numpy().T), np.cov(real.numpy().T)
    root = scipy.linalg.sqrtm(a @ b).real
    wanted = float(((found.mean(0) - real.mean(0)) ** 2).sum()) + np.trace(a + b - 2 * root)
    assert renders.fid(found, real) == pytest.approx(wanted, rel=1e-6)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_cosines_are_means_over_the_pairs_that_they_name():
    found, real = features(6, 0), features(4, 1)
    assert renders.similarity(found, real) == pytest.approx(np.mean([cosine(a, b) for a in found for b in real]))
    pairs = [cosine(real[i], real[j]) for i in range(4) for j in range(i)]
    assert renders.among(real) == pytest.approx(np.mean(pairs))
    prompts = found.reshape(2, 3, 5)
    wanted = np.mean([1 - cosine(one[i], one[j]) for one in prompts for i in range(3) for j in range(i)])
    assert renders.diversity(prompts) == pytest.approx(wanted)
    assert renders.drift(found, real[[0, 1, 2, 3, 0, 1]]) == pytest.approx(
        np.mean([1 - cosine(found[i], real[i % 4]) for i in range(6)])
    )
    assert renders.drift(found, found) == pytest.approx(0, abs=1e-12)


def test_one_picture_is_too_few():
    with pytest.raises(ValueError, match="at least two"):
        renders.kid(features(1, 0), features(3, 0))
    with pytest.raises(ValueError, match="at least two"):
        renders.among(features(1, 0))


def test_an_extractor_of_timm_from_a_file_or_a_folder(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3).eval()
    (tmp_path / "model.safetensors").write_bytes(save(network.state_dict()))
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = [Extractor("test_resnet", str(path)).build()(images) for path in (tmp_path, tmp_path / "model.safetensors")]
    assert torch.equal(*found)
    config = network.pretrained_cfg
    side, mean, std = config["input_size"][1:], config["mean"], config["std"]
    resized = torch.nn.functional.interpolate(images, side, mode="bicubic", antialias=True).clamp(0, 1)
    ready = (resized - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = network.forward_head(network.forward_features(ready), pre_logits=True)
    assert torch.allclose(found[0], wanted, atol=1e-5)


def test_features_of_a_judge_are_what_its_heads_read():
    torch.manual_seed(0)
    judge = Judge([2, 3, 4], widths=(4, 4, 4, 4)).eval()
    net = FeatureNet(judge, lambda images: judge.describe(images * 2 - 1), "judge")
    images = torch.rand(3, 3, 32, 32)
    assert torch.allclose(judge.heads["colour"](net(images)), judge(images * 2 - 1)["colour"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": "test_resnet"}, "checkpoint: 'test_resnet' needs a local file"),
        ({"checkpoint": "x"}, "the judge has its own weights"),
        ({"name": "test_resnet", "checkpoint": "x.pth"}, "'x.pth': no such file"),
        ({"name": "test_resnet", "checkpoint": "."}, "none of model.safetensors"),
    ],
)
def test_mistakes_with_extractors_are_named(options, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        Extractor(**options).build()


def test_weights_of_another_model_are_refused(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(save({"x": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"other.safetensors' lacks \d+ tensors of 'test_resnet'"):
        Extractor("test_resnet", str(tmp_path / "other.safetensors")).build()
    with pytest.raises(ValueError, match="'no_such_model' with .* cannot be loaded"):
        Extractor("no_such_model", str(tmp_path / "other.safetensors")).build()


def write_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    vision = sizes | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(folder)
    return str(folder)


def test_clip_score_is_a_hundred_cosines(tmp_path):
    folder = write_clip(tmp_path)
    images, prompts = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ["a", "a red star"]
    found = clip_score(images, prompts, folder)
    model, processor = load_clip(folder)
    assert torch.allclose(found, clip_score(images.flip(0), prompts[::-1], folder).flip(0), atol=1e-4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.48145466, 0.4578275, 0.40821073],
                                                           [0.26862954, 0.26130258, 0.27577711]))  # fmt: skip
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model((images - mean) / std).pooler_output)
        texts = processor.tokenizer(prompts, padding=True, return_tensors="pt")
        said = model.text_projection(model.text_model(**texts).pooler_output)
    wanted = 100 * torch.cosine_similarity(seen, said).clamp_min(0)
    assert torch.allclose(found, wanted, atol=1e-3)


def test_a_folder_without_clip_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        clip_score(torch.rand(1, 3, 8, 8), ["a"], str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        clip_score(torch.rand(1, 3, 8, 8), ["a"], str(tmp_path))
