"""The commands on files and on the catalogue: typed functions, each a command line by its signature."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from visadapt.cli import refuse
from visadapt.cli.errors import Friendly, UserError, nearby, purposeful, told
from visadapt.interop import Format


class ToolParser(Friendly, ArgumentParser):
    """The parser of one file command."""


def inspect(file: str, norms: bool = False) -> int:
    """Say what an adapter file is: kind, methods, hyper-parameters, targets, base, tensors.

    Only headers are read, and nothing in the file is run, unless norms are asked for.

    Args:
        file: A safetensors file, a PEFT folder, the folder of a run or a Lightning checkpoint.
        norms: Also read the tensors and print the norm of each, per layer.
    """
    from visadapt.cli.inspect import describe, show

    show(describe(adapter_in(file)), norms)
    return 0


def merge(
    adapter: str,
    output: str | None = None,
    sets: list[str] | None = None,
    tolerance: float = 1e-4,
    config: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
) -> int:
    """Fold an adapter into its base: what stock timm, segment-anything or diffusers loads.

    The base is that of the run that wrote the adapter (its config.yaml lies beside it), unless you name one. A merged
    diffusion pipeline is loaded again by stock diffusers and compared with the adapted model, as an export is.

    Args:
        adapter: Adapter file, PEFT folder or folder of a run.
        output: File to write (merged.safetensors; for a SAM also .pth, its official form); for a diffusion model a
            folder (merged).
        sets: Which sets of the file (default: all; of text-to-video those that are no appearance).
        tolerance: Largest deviation that is accepted: of outputs, relative to the largest; of a diffusion model that
            of latents and pixels in its certificate.
        config: Configuration that names the backbone.
        backbone: Name of a timm model, "tiny_digits", of a SAM ("vit_b") or of a diffusion model ("tiny_sd",
            "tiny_video", a pipeline's folder, a hub id, one file), instead of a configuration.
        checkpoint: Local weights of that backbone; of a Stable Diffusion the motion adapter (AnimateDiff).
    """
    from visadapt.cli.files import merge_file

    to = None if output is None else Path(output)
    merge_file(adapter_in(adapter), to, tolerance, config, backbone, checkpoint, sets)
    return 0


def export(
    adapter: str,
    output: str | None = None,
    format: Format = "peft",
    sets: list[str] | None = None,
    rank: int | None = None,
    tolerance: float = 1e-4,
    config: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
) -> int:
    """Write an adapter in the format of another tool; for diffusion models, prove that it renders the same.

    "peft" writes a folder (of a diffusion model: one for each part), "diffusers" what pipe.load_lora_weights reads,
    "kohya" one file of plain LoRA that every tool reads, "lycoris" and "comfyui" one file that keeps DoRA, LoHa, LoKr
    and Tucker cores. An export of a diffusion model is loaded into a fresh stock pipeline and compared;
    certificate.json says how far the two are apart, and a file that does nothing or something else is rejected.

    Args:
        adapter: Adapter file, or folder of a run.
        output: Folder or file to write (default: by the format).
        format: The other tool.
        sets: Which sets of the file (default: all; of text-to-video those that are no appearance).
        rank: Rank of the SVD of methods that the format cannot hold exactly; without it they are refused.
        tolerance: Largest deviation of latents and pixels that the certificate accepts.
        config: Configuration that names the backbone (default: the config.yaml of the adapter's run).
        backbone: Name of a timm model, "tiny_digits", or of a diffusion model ("tiny_sd", "tiny_video", a pipeline's
            folder, a hub id, one file), instead of a configuration.
        checkpoint: Local weights of that backbone; of a Stable Diffusion the motion adapter (AnimateDiff).
    """
    from visadapt.cli.diffusion_files import default_output
    from visadapt.cli.files import export_file

    to = Path(output or default_output(format))
    export_file(adapter_in(adapter), to, format, rank, tolerance, config, backbone, checkpoint, sets)
    return 0


def import_(
    adapter: str,
    output: str = "imported.safetensors",
    config: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
) -> int:
    """Read an adapter of another tool and write it as an adapter file of visadapt.

    Args:
        adapter: PEFT folder, or a file of diffusers, kohya, LyCORIS or ComfyUI.
        output: Adapter file to write.
        config: Configuration that names the backbone.
        backbone: Name of a timm model, "tiny_digits", or of a diffusion model ("tiny_sd", "tiny_video", a pipeline's
            folder, a hub id, one file), instead of a configuration.
        checkpoint: Local weights of that backbone; of a Stable Diffusion the motion adapter (AnimateDiff).
    """
    from visadapt.cli.files import import_file

    import_file(existing(adapter), Path(output), config, backbone, checkpoint)
    return 0


def compose(
    adapters: list[str],
    output: str = "composed.safetensors",
    weights: list[float] | None = None,
    how: Literal["concat", "svd", "linear", "zip", "make"] = "concat",
    rank: int | None = None,
    config: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
) -> int:
    """Put several adapters of one base into one file: visadapt compose A B --weights 0.7 0.5.

    "concat" is exactly the weighted sum, "svd" the nearest LoRA of a rank, "linear" interpolates factors as PEFT does,
    "zip" keeps adapters apart column by column (ZipLoRA, without data), "make" joins the content and the style run
    of Break-for-Make. How far the result is from the weighted sum is printed.

    Args:
        adapters: Two or more adapter files of any format.
        output: File to write (.safetensors).
        weights: One number for each adapter, also negative (default: 1).
        how: How shared layers are composed.
        rank: Rank for "svd" (default: the largest of the adapters).
        config: Configuration that names the backbone (default: the config.yaml of the first adapter's run).
        backbone: Name of a timm model, "tiny_digits", of a SAM ("vit_b") or of a Stable Diffusion ("tiny_sd", a
            pipeline's folder, a hub id, one file), instead of a configuration.
        checkpoint: Local weights of that backbone.
    """
    from visadapt.cli.compose import compose_files

    files = [adapter_in(file) for file in adapters]
    compose_files(files, Path(output), weights, how, rank, config, backbone, checkpoint)
    return 0


def truncate(adapter: str, rank: int | None = None, output: str = "truncated.safetensors") -> int:
    """Cut an adapter file to a rank, layer by layer: what DyLoRA or gates (SoRA, AdaLoRA, BeamLoRA) leave, as LoRA.

    DyLoRA gives its first components, the others those with the largest gates; components whose gate is zero go in
    any case, so that without a rank the update stays the same. Needs no base model.

    Args:
        adapter: Adapter file.
        rank: Components to keep in each layer (default: DyLoRA as many as it uses, the others all that are not zero).
        output: File to write (.safetensors).
    """
    from visadapt.cli.truncate import truncate_file

    truncate_file(adapter_in(adapter), Path(output), rank)
    return 0


def push(
    path: str, repo: str | None = None, private: bool = False, license: str | None = None, dry_run: bool = False
) -> int:
    """Send an adapter with its model card to the Hugging Face Hub: visadapt push runs/x/TIME --repo owner/name.

    Adapters go as safetensors, with the card, figures and pictures of the run; checkpoints and logs stay. Paths of
    this machine are cut to their last name. All goes in one commit. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        path: Folder of a run or of an export, or one adapter file.
        repo: owner/name; the repository is made if it is not there.
        private: Make a new repository private.
        license: Licence for the card, by its id on the Hub (apache-2.0, cc-by-4.0 …).
        dry_run: List the files with their sizes and print the card; send nothing.
    """
    from visadapt.cli.hub import push as send

    if repo is None:
        raise UserError("--repo", "this is required and missing", "--repo owner/name")
    send(existing(path), repo, private or None, license, dry_run)
    return 0


def pull(repo: str, revision: str | None = None, output: str | None = None) -> int:
    """Take an adapter with its model card from the Hugging Face Hub: visadapt pull owner/name.

    Only safetensors are taken, never pickles, and of a configuration only model and data of known classes. The folder
    appears whole or not at all.

    Args:
        repo: owner/name.
        revision: Branch, tag or commit (default: main).
        output: Folder to make (default: the repository's name).
    """
    from visadapt.cli.hub import pull as take

    take(repo, revision, None if output is None else Path(output))
    return 0


def methods(methods: str | None = None, markdown: bool = False) -> int:
    """Print the catalogue: equation, layer kinds, whether it merges and exports, source.

    Args:
        methods: Names, separated by commas (default: all); ``my_package.MyMethod`` for your own.
        markdown: Print a Markdown table.
    """
    from visadapt.cli.catalogue import show

    show(methods.split(",") if methods else None, markdown)
    return 0


def check(methods: str | None = None, verbose: bool = False, markdown: bool = False) -> int:
    """Run the property grid, method by layer by property, on this machine; status 1 if a cell fails.

    Args:
        methods: Names, separated by commas (default: all); ``my_package.MyMethod`` for your own.
        verbose: Also print why cells are refused.
        markdown: Print Markdown tables.
    """
    from visadapt.cli.check import run_grid

    return run_grid(methods.split(",") if methods else None, verbose, markdown)


TOOLS: dict[str, Callable[..., int]] = {
    "inspect": inspect,
    "merge": merge,
    "export": export,
    "import": import_,
    "compose": compose,
    "truncate": truncate,
    "push": push,
    "pull": pull,
    "methods": methods,
    "check": check,
}


def existing(file: str) -> Path:
    """The path of a file or folder that is there.

    Raises:
        UserError: it is not.
    """
    path = Path(file).expanduser()
    if not path.exists():
        raise UserError(file, "there is no such file or folder", nearby(file))
    return path


def adapter_in(file: str) -> Path:
    """The path of an adapter that is there: that in a run's folder, anything else as it is."""
    from visadapt.cli.rundir import adapter_file

    return Path(adapter_file(str(existing(file))))


def _refuse_output(output: str | None, makes_file: bool) -> None:
    """Before any work: nothing can be written where a file or a folder is in the way."""
    if output is None:
        return
    refuse.unwritable(Path(output), "--output")
    if not output or (makes_file and Path(output).is_dir()):
        raise UserError("--output", f"'{output}' is no name of a file", "name a file, such as adapter.safetensors")


def _switches(tool: Callable[..., int], args: list[str]) -> list[str]:
    """``--dry-run`` alone means ``--dry_run=true``: jsonargparse has no switches for plain functions."""
    spelt = {f"--{name.replace('_', '-')}": f"--{name}" for name in signature(tool).parameters}
    args = [spelt.get(arg.partition("=")[0], arg.partition("=")[0]) + "".join(arg.partition("=")[1:]) for arg in args]
    named = {f"--{name}" for name, p in signature(tool).parameters.items() if p.default is False}
    bare = [i + 1 == len(args) or args[i + 1].startswith("-") for i in range(len(args))]
    return [f"{arg}=true" if arg in named and alone else arg for arg, alone in zip(args, bare)]


def _lists(tool: Callable[..., int], args: list[str]) -> list[str]:
    """``A B --weights 1 2`` means ``["A","B"] --weights=[1,2]``: jsonargparse takes a list as one argument."""
    given = signature(tool).parameters
    wanted = {name for name, p in given.items() if str(p.annotation).startswith("list[")}
    if not wanted:
        return args
    several = next(iter(given)) in wanted  # what stands before the options
    runs: list[list[str]] = [[]]  # an option, or nothing, and the words up to the next option
    for arg in args:
        runs.append([arg]) if arg.startswith("--") else runs[-1].append(arg)
    found = []
    for option, words in [("", runs[0]), *((run[0], run[1:]) for run in runs[1:])]:
        plain = all(not word.startswith("[") for word in words)
        if option.removeprefix("--") in wanted and words and plain:
            found.append(f"{option}=[{','.join(words)}]")
        elif option == "" and several and words and plain:
            found.append(json.dumps(words))
        else:
            found += [option, *words] if option else words
    return found


def run(command: str, args: list[str]) -> int:
    """Run a tool with the arguments of the command line; 2 after the one message of a mistake."""
    tool = TOOLS[command]
    sys.path.append(os.getcwd())  # --methods my_module.MyMethod
    first = (tool.__doc__ or "").partition("\n\n    Args:")[0]
    parser = ToolParser(prog=f"visadapt {command}", description=first, allow_abbrev=False)
    parser.add_function_arguments(tool, as_positional=True)
    try:
        if not args and (needed := [n for n, p in signature(tool).parameters.items() if p.default is p.empty]):
            raise UserError(needed[0], "this is required and missing", f"visadapt {command} --help says what it takes")
        given = parser.parse_args(_switches(tool, _lists(tool, args))).as_dict()
        _refuse_output(given.get("output"), command in ("import", "compose", "truncate"))
        return tool(**given)
    except UserError as error:
        error.show(command)
    except Exception as error:
        ours = purposeful(error)
        if os.environ.get("VISADAPT_DEBUG", "") not in ("", "0") or ours is None:
            raise
        told(ours, lambda quoted: "").show(command)
    except KeyboardInterrupt:
        print(f"visadapt {command}: stopped", file=sys.stderr)
        return 130
    return 2
