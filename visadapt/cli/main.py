"""The front of ``visadapt``: standard library only, so that ``--help`` answers at once.

Training commands go on to LightningCLI (`visadapt.cli.fit`, seconds of imports), file commands to
`visadapt.cli.tools`. This module imports neither before it knows which one is wanted.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from pathlib import Path

TRAINING = {
    "fit": "train adapters:            visadapt fit --config configs/quickstart.yaml",
    "validate": "validate a checkpoint:     visadapt validate --ckpt_path RUN/checkpoints/last.ckpt",
    "test": "test a checkpoint:         visadapt test --ckpt_path RUN/checkpoints/last.ckpt",
    "predict": "label, segment, render:    visadapt predict --adapter RUN/adapter.safetensors --images DIR",
}
FILES = {
    "inspect": "say what an adapter file is (visadapt, PEFT, kohya, diffusers)",
    "merge": "fold an adapter into its base; stock timm loads the result",
    "export": "write an adapter as a PEFT folder",
    "import": "read a PEFT folder into a visadapt adapter file",
    "compose": "put several adapters into one: sum, SVD, linear, ZipLoRA, Break-for-Make",
    "truncate": "cut an adapter file to a rank: DyLoRA, SoRA, AdaLoRA, BeamLoRA become LoRA",
    "push": "send an adapter with its model card to the Hugging Face Hub (--dry-run shows it)",
    "pull": "take an adapter from the Hub: visadapt pull owner/name",
}
ABOUT = {
    "app": "start a demo in the browser: visadapt app (lists them)",
    "methods": "table of the methods: equation, layers, mergeable, exportable, source",
    "check": "run the property grid of the methods on this machine",
    "completion": "print the shell completion: visadapt completion bash | zsh",
}
COMMANDS = TRAINING | FILES | ABOUT
RUN_FILES = ("--ckpt_path", "--adapter")


def usage() -> str:
    """Text of ``visadapt --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: visadapt COMMAND [options]", "       visadapt COMMAND --help", ""]
    for title, group in (("Train and use", TRAINING), ("Adapter files", FILES), ("About", ABOUT)):
        lines += [title, *(f"  {name:<{width}}{text}" for name, text in group.items()), ""]
    lines += [
        "Options",
        f"  {'--version':<{width}}print the version",
        f"  {'--help':<{width}}print this text",
    ]
    return "\n".join(lines)


def version() -> str:
    """Version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("visadapt")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "unknown (not installed)"


def find_config(file: str) -> Path | None:
    """The ``config.yaml`` of the run that wrote ``file``: beside it, or up to two folders above."""
    place = Path(file).resolve()
    for folder in [place, *place.parents][:4]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None


def option(args: list[str], *names: str) -> str | None:
    """Value of the last of the options ``names``, written as ``--name value`` or ``--name=value``."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in names:
            found = value if equals else (args[i + 1] if i + 1 < len(args) else None)
    return found


def with_run_config(command: str, args: list[str]) -> list[str]:
    """Add ``--config RUN/config.yaml`` where the command line names a file of a run and no configuration.

    Only for the commands that use what a run has made; ``fit`` must say what it trains.
    """
    if command == "fit" or option(args, "-c", "--config") or "--help" in args or "-h" in args:
        return args
    if command == "predict" and (name := option(args, "--backbone")):
        from visadapt.cli.prompts import with_backbone

        return with_backbone(args, name)
    for name in RUN_FILES:
        file = option(args, name)
        if file and (config := find_config(file)):
            return ["--config", str(config), *args]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, or 2 where the command line or the configuration is wrong.

    Args:
        argv: Arguments without the programme's name; the process's own when omitted. They replace those of
            the process, because the processes of ``strategy: ddp`` start again from ``sys.argv``.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version", "version"):
        print(f"visadapt {version()}")
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean: {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
        print(f"visadapt: there is no command {command!r}\n  {hint}\n  more: visadapt --help", file=sys.stderr)
        return 2
    if command == "completion":
        from visadapt.cli.completion import run

        return run(rest)
    # jsonargparse 4.5x warns about calls inside Lightning 2.6, which no user can change
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    if command == "app":
        from visadapt.cli.app import run as run_app

        return run_app(rest)
    if command not in TRAINING:
        from visadapt.cli.tools import run as run_tool

        return run_tool(command, rest)
    rest = with_run_config(command, rest)
    sys.argv = [sys.argv[0], command, *rest]
    from visadapt.cli.fit import run as run_training

    return run_training()


if __name__ == "__main__":
    sys.exit(main())
