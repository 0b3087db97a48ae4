"""Every kind of bad input and its one clear message: where it is, what is wrong, what was perhaps meant."""

import copy

import pytest
import yaml

from visadapt.cli.main import main

from .conftest import tiny, write


def changed(path: str, value, config: dict | None = None) -> dict:
    """The tiny configuration with one key set; a value of ... removes it."""
    found = copy.deepcopy(config or tiny())
    *parents, last = path.split("/")
    node = found
    for name in parents:
        node = node[int(name) if isinstance(node, list) else name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return found


def renamed(path: str, new: str) -> dict:
    """The tiny configuration with one key misspelt."""
    parent, _, last = path.rpartition("/")
    found = tiny()
    node = found
    for name in parent.split("/") if parent else []:
        node = node[int(name) if isinstance(node, list) else name]
    node[new] = node.pop(last)
    return found


ARGS, ADAPTER = "model/init_args", "model/init_args/adapters/0"
BACKBONE, METHOD = f"{ARGS}/backbone", f"{ADAPTER}/method"
TEXT = yaml.safe_dump(tiny())

# name: (configuration, further arguments, where, what, hint)
CASES = {
    "key of the file": (changed("modle", 3), [], "modle", "no such key", "did you mean: model?"),
    "trainer option": (renamed("trainer/max_epochs", "max_epoch"), [], "trainer.max_epoch", "no such key",
                       "trainer.max_epochs?"),
    "trainer flag": (tiny(), ["--trainer.max_epoch=3"], "trainer.max_epoch", "no such key", "trainer.max_epochs?"),
    "flag": (tiny(), ["--modle.x=3"], "modle.x", "no such key", "model?"),
    "option of the task": (renamed(f"{ARGS}/adapters", "adpters"), [], "model.adpters",
                           "Classification has no option 'adpters'", "adapters?"),
    "option of a set": (renamed(f"{ADAPTER}/targets", "tagets"), [], "model.adapters.tagets",
                        "Adaptation has no option", "targets?"),
    "hyper-parameter": (renamed(f"{METHOD}/init_args/rank", "rnk"), [], "model.adapters.method.rnk",
                        "LoRA has no option 'rnk'", "rank?"),
    "option of the backbone": (renamed(f"{BACKBONE}/init_args/img_size", "imgsize"), [], "model.backbone.imgsize",
                               "TimmViT has no option", "img_size?"),
    "option of the optimiser": (tiny(), ["--model.optimizer.lrr=1"], "model.optimizer.lrr",
                                "AdamW has no option", "lr?"),
    "task class": (changed("model/class_path", "Clasification"), [], "model", "no class 'Clasification'",
                   "Classification?"),
    "method class": (changed(f"{METHOD}/class_path", "LorA"), [], "model.adapters.method", "no class 'LorA'",
                     "LoRA?"),
    "backbone class": (changed(f"{BACKBONE}/class_path", "TimVit"), [], "model.backbone", "no class 'TimVit'",
                       "TimmViT?"),
    "data class": (changed("data/class_path", "Digts"), [], "data", "no class 'Digts'", "Digits?"),
    "callback class": (changed("trainer/callbacks", [{"class_path": "EarlyStoping"}]), [], "trainer.callbacks",
                       "no class 'EarlyStoping'", "EarlyStopping?"),
    "optimiser class": (tiny(), ["--model.optimizer=AdmW"], "model.optimizer", "no class 'AdmW'", "AdamW?"),
    "class missing": (changed(f"{METHOD}/class_path", ...), [], "model.adapters.method.rank", "no option",
                      "class_path"),
    "forbidden import": (changed(f"{ARGS}/optimizer/class_path", "os.system"), [], "model.optimizer",
                         "must not import 'os.system'", ""),
    "task missing": (changed("model", ...), [], "model", "required and missing", "--model"),
    "backbone missing": (changed(f"{ARGS}/backbone", ...), [], "model.backbone", "requires it", "--model.backbone"),
    "type of a hyper-parameter": (changed(f"{METHOD}/init_args/rank", "four"), [], "model.adapters.method.rank",
                                  "expected int, got 'four'", ""),
    "type of a trainer option": (tiny(), ["--trainer.max_epochs=many"], "trainer.max_epochs",
                                 "expected int, got 'many'", ""),
    "type of a data option": (tiny(), ["--data.batch_size=x"], "data.batch_size", "expected int, got 'x'", ""),
    "choice": (changed(f"{ARGS}/head", "tran"), [], "model.head", "expected one of auto, train, freeze",
               "train?"),
    "group that is null": (tiny(), ["--model.schedule=null"], "model.schedule", "cannot do without it", "warmup"),
    "domain": (changed("data/init_args/domain", "invertd"), [], "data.domain", "'invertd' is not one of", ""),
    "targets": (changed(f"{ADAPTER}/targets", ["attn.qvk"]), [], "model.adapters.targets",
                "'attn.qvk' matches no layer", ""),
    "model name": (changed(f"{BACKBONE}/init_args/name", "vit_tny_patch16_224"), [], "model.backbone.name",
                   "vit_tiny_patch16_224", ""),
    "checkpoint of the base": (changed(f"{BACKBONE}/init_args/checkpoint", "gone.safetensors"), [],
                               "model.backbone.checkpoint", "'gone.safetensors' does not exist", ""),
    "folder of images": (changed("data", {"class_path": "ImageFolder", "init_args": {"root": "nowhere"}}), [],
                         "data.root", "folder 'nowhere' does not exist", ""),
    "file of a part": (tiny(), ["--model.backbone=backbon.yaml"], "model.backbone", "no file 'backbon.yaml'", ""),
    "GPU": (tiny(), ["--trainer.accelerator=gpu", "--trainer.devices=99"], "trainer.", "", "CUDA devices"),
    "strategy": (tiny(), ["--trainer.strategy=dpp"], "trainer.strategy", "dpp", "ddp?"),
    "precision": (tiny(), ["--trainer.precision=bf17"], "trainer.precision", "got 'bf17'", "bf16?"),
    "checkpoint missing": (tiny(), ["--ckpt_path=gone.ckpt"], "--ckpt_path", "no file 'gone.ckpt'", ""),
    "checkpoint broken": (tiny(), ["--ckpt_path=bad.yaml"], "--ckpt_path", "is no checkpoint", ""),
    "YAML syntax": (TEXT + "\n  foo: [1\n", [], "bad.yaml:", "YAML syntax", "near: foo: [1"),
    "key given twice": (TEXT + "trainer: {}\n", [], "bad.yaml:", "'trainer' is given twice", ""),
    "no mapping": ("just text\n", [], "bad.yaml", "expected a mapping", ""),
    "empty file": ("", [], "bad.yaml", "the file is empty", ""),
    "file missing": (None, ["--config=bda.yaml"], "--config", "no file 'bda.yaml'", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_explained_in_three_lines(case, here, capsys):
    config, args, where, what, hint = CASES[case]
    if config is not None:
        args = ["--config", write(here / "bad.yaml", config), *args]
    try:
        status = main(["fit", *args])
    except SystemExit as left:  # the parser leaves by itself, as argparse does
        status = left.code
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(("Seed set", "GPU available"))]
    assert status == 2
    assert 2 <= len(lines) <= 3, lines
    assert lines[0].startswith("visadapt fit: error at '")
    assert where in lines[0]
    assert what in lines[1]
    assert hint in "\n".join(lines[2:])
    assert not (here / "runs").exists(), "nothing may be written before the configuration is right"


def test_a_defect_keeps_its_traceback(here, monkeypatch):
    from visadapt.tasks.classification import Classification

    monkeypatch.setattr(Classification, "build", lambda self: {}["defect"])
    with pytest.raises(KeyError, match="defect"):
        main(["fit", "--config", write(here / "tiny.yaml", tiny())])
