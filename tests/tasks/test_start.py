"""Training that starts from an adapter file: what fits goes on from there, what does not is told before a step."""

import warnings

import pytest
import torch

import visadapt as va
from tests.diffusion_training import PictureData, base
from tests.diffusion_training import task as diffusion
from tests.diffusion_training import train as train_diffusion
from tests.tiny import moved
from tests.training import Crash, CrashAt, TinyTask, train, weights
from visadapt.backbones.sd_tokens import NewToken
from visadapt.core.model import is_adapter_key

TARGETS = ["attn.qkv:q", "mlp.fc1"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(method=None, targets=TARGETS, name="default", **kwargs):
    task = TinyTask(adapters=[va.Adaptation(method or va.LoRA(rank=2), targets, name)], **kwargs)
    task.configure_model()
    return task


@pytest.fixture
def file(tmp_path):
    """Adapters and a head away from their start."""
    task = tiny()
    moved(task.model)
    return va.save(task.model, tmp_path / "first.safetensors")


def adapters_of(task):
    return {k: v for k, v in weights(task).items() if is_adapter_key(k) or k.startswith("head.")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def problem(task):
    with pytest.raises((ValueError, FileNotFoundError)) as found:
        task._check_start()
    text = str(found.value)
    assert text.startswith("model.start: ")
    return text


def test_sets_and_head_start_from_the_file(file):
    first, second = tiny(), tiny(start=str(file))
    second._check_start()
    assert not equal(adapters_of(first), adapters_of(second))
    loaded = va.load(TinyTask(adapters=[]).build(), file)
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in adapters_of(second).items())
    assert second.base == first.base
    assert {n for n, p in second.model.named_parameters() if p.requires_grad} == {
        n for n, p in first.model.named_parameters() if p.requires_grad
    }
    assert second.adapter_metadata() == {"start": str(file)}


def test_one_set_may_have_another_name_and_options_of_training(file):
    task = tiny(va.LoRA(rank=2, dropout=0.3), name="more", start=str(file))
    task._check_start()
    assert [a.up.abs().sum() > 0 for a in va.adapters(task.model, "more").values()]


MISMATCHES = {
    "rank": ({"method": va.LoRA(rank=3)}, r"rank=2 in the file, 3 here"),
    "scale": ({"method": va.LoRA(rank=2, alpha=8)}, r"acts differently: alpha=None in the file, 8"),
    "method": ({"method": va.DoRA(rank=2)}, r"is a LoRA, here a DoRA"),
    "fewer": ({"targets": TARGETS[:1]}, r"mlp.fc1' are of the file|and \d+ more|of the file, not"),
    "more": ({"targets": [*TARGETS, "mlp.fc2"]}, r"here alone"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_what_does_not_fit_is_told(file, case):
    import re

    options, text = MISMATCHES[case]
    assert re.search(text, problem(tiny(**options, start=str(file))))


def test_sets_tokens_and_files_that_are_not_there(file, tmp_path):
    assert "there is no file" in problem(tiny(start="nowhere.safetensors"))
    two = TinyTask(adapters=[va.Adaptation(va.LoRA(rank=2), TARGETS, n) for n in ("a", "b")], start=str(file))
    two.configure_model()
    assert "holds the set 'default', here there is 'a', 'b'" in problem(two)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="bad.safetensors"):
        tiny(start=str(tmp_path / "bad.safetensors"))._check_start()


def test_a_run_that_cannot_start_takes_no_step(file, tmp_path):
    task = tiny(va.LoRA(rank=3), start=str(file))
    with pytest.raises(ValueError, match="model.start"):
        train(tmp_path, task=task)
    assert task.losses == []


def test_a_resumed_run_has_the_values_of_the_checkpoint(file, tmp_path):
    def one():
        return tiny(start=str(file))

    whole = train(tmp_path / "whole", task=one())
    with pytest.raises(Crash):
        train(tmp_path / "cut", CrashAt(5), task=one())
    file.unlink()
    resumed = train(tmp_path / "cut", task=one(), resume=tmp_path / "cut" / "last.ckpt")
    assert equal(weights(whole), weights(resumed))


# --- Stable Diffusion --------------------------------------------------------------------
def saved(path, **kwargs):
    task = diffusion(**kwargs)
    task.configure_model()
    moved(task.model, 0.1)
    return task, va.save(task.model, path, extra=task.adapter_metadata())


def test_files_of_other_tools(tmp_path):
    task, _ = saved(tmp_path / "a.safetensors")
    va.export(task.model, tmp_path / "k.safetensors", format="kohya")
    va.export(task.model, tmp_path / "peft")
    for path in ("k.safetensors", "peft"):
        again = diffusion(start=str(tmp_path / path))
        again.configure_model()
        again._check_start()
        for (key, wanted), found in zip(adapters_of(task).items(), adapters_of(again).values(), strict=True):
            torch.testing.assert_close(found, wanted, msg=key)


def test_new_words_go_on_and_have_to_train(tmp_path):
    words = [NewToken("<x>", "no")]
    task, path = saved(tmp_path / "a.safetensors", tokens=words)
    again = diffusion(tokens=words, start=str(path))
    again.configure_model()
    again._check_start()
    assert equal(adapters_of(task), adapters_of(again))
    assert torch.equal(task.render(["<x>"], [0]), again.render(["<x>"], [0]))
    without = diffusion(start=str(path))
    without.configure_model()
    assert "brings the new word '<x>'" in problem(without)


def test_both_stages_of_break_for_make(tmp_path):
    """Content and style apart, made into one, trained together."""
    halves = {}
    for learns in ("content", "style"):
        sets = [va.Adaptation(va.B4M(rank=4, learns=learns), ["unet.cross"])]
        task = train_diffusion(tmp_path / learns, task=diffusion(adapters=sets), max_epochs=1)
        halves[learns] = va.save(task.model, tmp_path / f"{learns}.safetensors")
    from visadapt.backbones import StableDiffusion

    model = StableDiffusion(base()).build()
    va.compose(model, [halves["content"], halves["style"]], how="make")
    made = va.save(model, tmp_path / "made.safetensors")
    joint = [va.Adaptation(va.B4M(rank=4), ["unet.cross"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = diffusion(adapters=joint, start=str(made))
        task.configure_model()
    task._check_start()
    assert equal(adapters_of(task), {k: v for k, v in model.state_dict().items() if is_adapter_key(k)})
    before = weights(task)
    from visadapt.callbacks.riemannian import Riemannian

    after = weights(train_diffusion(tmp_path / "joint", Riemannian(), task=task, data=PictureData(4, batch_size=2)))
    changed = {k.rpartition(".")[2] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"up", "down"}
