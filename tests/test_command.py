"""The command line: help without waiting, wrong commands and options in one line, values in their type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from bundle.__main__ import COMMANDS, _given, check_flags, command_help, overview, source, typed
from custom_modules import bundle_version
from custom_modules.errors import InputError


def wldm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bundle", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_help_and_version_do_not_import_pytorch():
    program = (
        "import sys, runpy; sys.argv = ['wldm', *sys.argv[1:]]\n"
        "try: runpy.run_module('bundle', run_name='__main__')\n"
        "finally: print('heavy:', sorted({'torch', 'monai', 'itk', 'numpy'} & set(sys.modules)))"
    )
    for arguments in ([], ["--help"], ["--version"], ["synthesize", "--help"], ["compare", "--help"]):
        result = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "heavy: []" in result.stdout, result.stderr


def test_the_overview_has_a_line_for_every_command():
    for name in COMMANDS:
        assert f"\n  {name}" in overview()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_and_setting_with_its_default(name):
    text = command_help(name)
    for argument in source(name).args.args:
        assert argument.arg in text.lower() or argument.arg.upper() in text
    if COMMANDS[name][1] == "inference":
        assert "--num_inference_steps" in text and "from 1 to 1000). Default 1." in text and "Default false." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthesise", "a.nii"], "error: no command 'synthesise'; did you mean 'synthesize'?"),
        (["evaluate", "--dataset_di", "x"], "error: evaluate has no option --dataset_di; did you mean --dataset_dir?"),
        (
            ["synthesize", "a.nii", "--num_sampels", "3"],
            "error: synthesize has no option --num_sampels; did you mean --num_samples?",
        ),
        (["phantom", "x", "--patiens=3"], "error: phantom has no option --patiens"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(arguments, message):
    result = wldm(*arguments)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_nested_settings_and_switched_off_options_are_allowed():
    check_flags("synthesize", ["a.nii", "--network_def#channels", "[4, 8]", "--sw-batch-size=2"])
    check_flags("evaluate", ["--nopictures", "--dataset_dir", "x"])
    check_flags("prepare", ["in", "out", "--min_dice", "0.5"])  # knows its own settings


def example(path: str, pictures: bool = True, workers: int = 1, share: float = 0.5, name: str | None = None) -> None:
    example.seen = (path, pictures, workers, share, name)


@pytest.mark.parametrize("text", ["false", "False", "no", "0", 0, False])
def test_values_become_what_the_signature_says(text):
    typed(example)("x", pictures=text, workers="3", share=1)
    assert example.seen == ("x", False, 3, 1.0, None) and isinstance(example.seen[3], float)


@pytest.mark.parametrize("wrong", [{"pictures": "maybe"}, {"workers": 1.5}, {"workers": True}, {"share": "many"}])
def test_values_of_another_type_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))} .*must be"):
        typed(example)("x", **wrong)


@pytest.mark.integration
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_and_leaves_no_half_written_file(number, status, tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from custom_modules.errors import end_in_one_line_on_signals; from custom_modules.files import atomic_write\n"
        "end_in_one_line_on_signals()\n"
        f"with atomic_write(Path({str(tmp_path)!r}, 'a.txt')) as path:\n"
        "    path.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status and errors == f"\nerror: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_the_metadata():
    assert wldm("--version").stdout == f"wldm {bundle_version()}\n"


@pytest.mark.parametrize(
    ("arguments", "flag", "on"),
    [
        (["a", "--quiet"], "--quiet", True),
        (["--quiet", "false"], "--quiet", False),
        (["--quiet=yes"], "--quiet", True),
        ([], "--quiet", False),
        (["--quiet=0"], "--quiet", False),
        (["--quiet", "true"], "--verbose", False),
        (["--quiet", "--seed", "0"], "--quiet", True),
    ],
)
def test_quiet_and_verbose_are_read_before_the_command_is_imported(arguments, flag, on):
    assert _given(arguments, flag) is on
