"""The front answers without torch; what it does not know it explains."""

import os
import subprocess
import sys

import pytest

from visadapt.cli.main import COMMANDS, find_config, main, with_run_config


def cpu_seconds(*args: str) -> tuple[float, subprocess.CompletedProcess]:
    """CPU time of a child: what the command costs, whatever else the machine does."""
    before = os.times()
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return spent, done


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_take_a_fifth_of_a_second(option):
    found = [cpu_seconds("-m", "visadapt.cli.main", option) for _ in range(3)]
    assert all(done.returncode == 0 and "visadapt" in done.stdout for _, done in found)
    assert min(seconds for seconds, _ in found) < 0.2


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)


def test_the_front_does_not_import_torch():
    _, done = cpu_seconds("-X", "importtime", "-m", "visadapt.cli.main", "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "visadapt.cli" in imported
    assert not imported & {"torch", "lightning", "numpy", "jsonargparse", "timm", "yaml"}


def test_inspect_and_the_front_do_not_import_torch():
    code = "import sys, visadapt.cli.main, visadapt.cli.inspect, visadapt.cli.tools; print('torch' in sys.modules)"
    assert cpu_seconds("-c", code)[1].stdout.strip() == "False"


@pytest.mark.parametrize(("word", "hint"), [("fti", "fit"), ("predcit", "predict"), ("method", "methods")])
def test_an_unknown_command_is_answered_with_the_nearest(word, hint, capsys):
    assert main([word]) == 2
    assert f"did you mean: {hint}?" in capsys.readouterr().err


def test_no_command_prints_the_usage(capsys):
    assert main([]) == 2
    assert "usage: visadapt" in capsys.readouterr().out


def test_completion_is_valid_shell(capsys):
    assert main(["completion", "bash"]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    script = text + '\nCOMP_WORDS=(visadapt pre); COMP_CWORD=1; _visadapt; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "predict"
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 2


def test_the_configuration_of_a_run_is_found_from_its_files(tmp_path):
    run = tmp_path / "runs" / "x" / "1"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert find_config(str(checkpoint)) is None
    (run / "config.yaml").write_text("a: 1")
    assert find_config(str(checkpoint)) == run / "config.yaml"
    args = ["--ckpt_path", str(checkpoint)]
    assert with_run_config("test", args) == ["--config", str(run / "config.yaml"), *args]
    assert with_run_config("test", ["-c", "other.yaml", *args])[0] == "-c"
    assert with_run_config("fit", args) == args  # fit says itself what it trains
