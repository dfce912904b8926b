"""The command line itself: its version, its usage, its start, its output where a program reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cluscomp_peft import __version__
from cluscomp_peft.cli import main
from tests import warm


def run(*arguments: str, command: tuple[str, ...] = ("-m", "cluscomp_peft")) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, timeout=120)


def test_the_version_is_printed_by_the_package_too():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cluscomp {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["plan", "--help"], ["chat", "--help"]])
def test_help_imports_no_library(arguments):
    code = (
        "import sys\n"
        "from cluscomp_peft.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "finally:\n"
        "    print([name for name in ('torch', 'transformers', 'peft', 'numpy', 'numba') if name in sys.modules])\n"
    )
    done = run(command=("-c", code))
    assert done.stdout.startswith("usage: cluscomp") and done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "usage", "near"),
    [
        (["compress", "a", "b", "--bitz", "3"], "usage: cluscomp compress ", "--bits"),
        (["evaluate", "a", "--data", "b", "--max-token-count", "3"], "usage: cluscomp evaluate ", "--max-tokens"),
        (["inspct", "a"], "usage: cluscomp ", "inspect"),
    ],
)
def test_a_wrong_word_comes_with_its_usage_and_the_nearest(capsys, arguments, usage, near):
    with pytest.raises(SystemExit) as status:
        main(arguments)
    err = capsys.readouterr().err
    assert status.value.code == 2
    assert err.startswith(usage) and err.endswith(f"; did you mean {near}?\n")


def test_a_word_that_is_near_nothing_is_only_refused(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "a", "--xyz"])
    err = capsys.readouterr().err
    assert err.startswith("usage: cluscomp inspect ") and err.endswith("unrecognized arguments: --xyz\n")


def test_compress_prints_one_object(tmp_path, dense_dir, capsys):
    target = str(tmp_path / "out")
    assert main(["compress", dense_dir, target, "--bits", "6", "--calibration", "none", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["folder"] == target and summary["matrices"] == 14 and summary["true_bits"] <= 6


def test_a_pipe_that_is_closed_early_is_no_error_of_ours(compressed_dir):
    code = (
        "import sys\n"
        "from cluscomp_peft.cli import main\n"
        "sys.stdin.read()\n"  # until the other end of stdout is closed
        f"sys.exit(main(['inspect', {compressed_dir!r}]))\n"
    )
    process = subprocess.Popen(
        [warm.python(), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(120) == 141 and "Traceback" not in err and "BrokenPipe" not in err


def test_a_shell_completes_commands_and_flags(tmp_path):
    pytest.importorskip("argcomplete")
    for line, expected in (("cluscomp me", {"merge "}), ("cluscomp plan --gp", {"--gpu-memory "})):
        out = tmp_path / "out"
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        code = "from cluscomp_peft.cli import main; main()"
        environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
        subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)
        assert set(out.read_text().split("\n")) == expected
