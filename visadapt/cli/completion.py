"""Shell completion written by hand: static text, so that a TAB costs nothing.

The completion that jsonargparse generates for LightningCLI is 78 MB of bash, and argcomplete imports torch at
each TAB. A dozen options and the names of files are what people complete.
"""

from __future__ import annotations

import sys

from visadapt.cli.main import COMMANDS, TRAINING

OPTIONS = (
    "--config --ckpt_path --run_dir --print_config --seed_everything --model --data --trainer.max_epochs "
    "--trainer.devices --trainer.accelerator --trainer.precision --trainer.strategy "
    "--model.optimizer --data.batch_size --help"
)
TOOL_OPTIONS = (
    "--help --output --config --backbone --checkpoint --norms --format --methods --weights --how --rank --sets "
    "--tolerance --adapter --base --port --auth --repo --dry-run --private --license --revision"
)
PREDICT_OPTIONS = "--adapter --images --output --prompts --seeds --backbone"

BASH = """\
# visadapt completion for bash:  eval "$(visadapt completion bash)"
_visadapt() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
  elif [[ "$word" == -* ]]; then
    case "$command" in
      predict) COMPREPLY=($(compgen -W "{options} {predict_options}" -- "$word")) ;;
      {training}) COMPREPLY=($(compgen -W "{options}" -- "$word")) ;;
      *) COMPREPLY=($(compgen -W "{tool_options}" -- "$word")) ;;
    esac
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _visadapt visadapt
"""

ZSH = """\
# visadapt completion for zsh:  eval "$(visadapt completion zsh)"
autoload -U +X bashcompinit && bashcompinit
"""


def script(shell: str) -> str:
    """Completion script of one shell (``bash`` or ``zsh``)."""
    bash = BASH.format(
        commands=" ".join(COMMANDS),
        training="|".join(name for name in TRAINING if name != "predict"),
        options=OPTIONS,
        predict_options=PREDICT_OPTIONS,
        tool_options=TOOL_OPTIONS,
    )
    return bash if shell == "bash" else ZSH + bash


def run(args: list[str]) -> int:
    """``visadapt completion bash|zsh``: print the script; status 2 for any other shell."""
    if len(args) == 1 and args[0] in ("bash", "zsh"):
        print(script(args[0]))
        return 0
    print(
        'usage: visadapt completion bash | zsh\n  add it: eval "$(visadapt completion bash)"',
        file=sys.stderr if args != ["--help"] else sys.stdout,
    )
    return 0 if args == ["--help"] else 2
