"""The one table of settings: defaults pass it, values are checked and converted, unknown names are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import INFERENCE, ROOT
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from custom_modules.config_check import STRUCTURE, check_settings, given_on_command_line
from custom_modules.errors import InputError
from custom_modules.settings import SETTINGS, Setting, number, parse_bool

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def inference(**values) -> ConfigParser:
    parser = ConfigParser(ConfigParser.load_config_file(str(INFERENCE)))
    parser.update(values)
    return parser


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_defaults_of_every_config_are_allowed(path):
    for name, value in ConfigParser.load_config_file(str(path)).items():
        if name in SETTINGS and not str(value).startswith(("$", "@", "[*")) and "$" not in str(value):
            parsed = SETTINGS[name].parse(name, value)
            assert parsed == value and isinstance(parsed, bool) == isinstance(value, bool)


def test_every_plain_value_of_the_inference_config_is_in_the_table_or_belongs_to_the_network():
    """So that a setting that changes the result cannot be forgotten in the record of a synthesis."""
    network = set(
        [
            "latent_channels",
            "autoencoder_channels",
            "autoencoder_blocks",
            "stem",
            "wavelet",
            "denoiser_channels",
            "dsca",
            "mr_skip",
            "prediction",
            "num_train_timesteps",
            "beta_end",
        ]
    )
    components = {"handlers"}
    for name, value in ConfigParser.load_config_file(str(INFERENCE)).items():
        if not isinstance(value, dict) and name not in STRUCTURE | network | components:
            assert name in SETTINGS or str(value).startswith("$"), name


@pytest.mark.parametrize("text", ["true", "True", "yes", "1", "on", 1, True])
@pytest.mark.parametrize("name", ["strict", "crop_above_shoulders", "resume", "amp", "check_data", "compile"])
def test_true_is_true_and_false_is_false_everywhere(name, text):
    assert SETTINGS[name].parse(name, text) is True
    opposite = {"true": "false", "True": "False", "yes": "no", "1": "0", "on": "off", 1: 0}[text]
    assert SETTINGS[name].parse(name, opposite) is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 0), ("num_samples", "two"), ("num_inference_steps", "abc"), ("num_inference_steps", 1001),
        ("seed", -5), ("seed", 1.5), ("overlap", 1), ("overlap", "nan"), ("output", "median"), ("sampling", "fast"),
        ("memory_limit", "4GB"), ("memory_limit", -1), ("spacing", 1), ("spacing", [1, 2]), ("spacing", [0, 1, 1]),
        ("hu_window", [100, -100]), ("hu_window", "low,high"), ("strict", "perhaps"), ("window_size", [64, 64, 6.5]),
        ("device", "gpu"), ("device", "cuda:7"), ("device", "meta"), ("dataset_dir", ""), ("dataset_dir", None),
        ("learning_rate", 0), ("max_epochs", True), ("halo", "inf"), ("tile_voxels", 1),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_refused_in_one_line_with_what_is(name, value):
    with pytest.raises(InputError, match=f"--{name}[ :]") as error:
        SETTINGS[name].parse(name, value)
    assert "\n" not in str(error.value) and str(value) in str(error.value)


@given(
    st.one_of(st.integers(-(10**30), 10**30), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.floats()))
)
def test_any_value_is_converted_into_the_range_or_refused(value):
    for name, setting in SETTINGS.items():
        try:
            parsed = setting.parse(name, value)
        except InputError:
            continue
        if setting.kind in ("int", "float") and parsed is not None:
            assert setting.low <= parsed <= setting.high and not isinstance(parsed, bool)
            assert isinstance(parsed, int if setting.kind == "int" else (int, float))
        if setting.kind == "bool":
            assert isinstance(parsed, bool)
        assert setting.parse(name, parsed) == parsed


@given(st.integers(-(2**53), 2**53))
def test_whole_numbers_keep_every_digit(value):
    assert number(value, True) == number(str(value), True) == value


@pytest.mark.parametrize("value", ["", "2", "y", None, [], 2])
def test_what_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match="neither"):
        parse_bool(value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("seeed", "seed"), ("num_samlpes", "num_samples"), ("strct", "strict"), ("out_dir", "output_dir")],
)
def test_an_unknown_setting_is_refused_with_the_one_that_was_meant(name, meant):
    with pytest.raises(InputError, match=f"no setting '{name}'.*did you mean '{meant}'"):
        check_settings(inference(**{name: 1}))


def test_a_setting_that_the_config_does_not_use_is_refused_when_it_is_asked_for():
    """adversarial_weight belongs to training; an overlay may carry it, a command line must not."""
    parser = inference(adversarial_weight=0.1)
    check_settings(parser)
    with pytest.raises(InputError, match="no setting 'adversarial_weight' in this config"):
        check_settings(parser, ["adversarial_weight"])


def test_an_overlays_own_values_are_allowed_when_something_refers_to_them():
    parser = inference(**{"my_margin": 7, "margin": "@my_margin"})
    check_settings(parser)
    assert parser["my_margin"] == 7


def test_values_are_converted_in_place():
    parser = inference(strict="false", num_samples="4", spacing="[2, 2, 2]", memory_limit="null")
    check_settings(parser)
    assert parser["strict"] is False and parser["num_samples"] == 4
    assert parser["spacing"] == [2.0, 2.0, 2.0] and parser["memory_limit"] is None


@pytest.mark.parametrize("name", ["quiet", "verbose"])
@pytest.mark.parametrize("config", ["inference", "train", "evaluate"])
def test_how_much_is_printed_can_be_set_in_every_config(config, name):
    parser = ConfigParser(ConfigParser.load_config_file(str(ROOT / "configs" / f"{config}.yaml")))
    check_settings(parser, [name])


def test_the_command_line_of_monai_is_read_and_others_are_not():
    arguments = [
        "/x/monai/bundle/__main__.py",
        "run",
        "--config_file",
        "a.yaml",
        "--seed=3",
        "--inferer#seed",
        "4",
        "--a::b",
        "1",
    ]
    assert given_on_command_line(arguments) == ["seed", "inferer", "a"]
    assert given_on_command_line(["/usr/bin/pytest", "--seed", "3"]) == []


@pytest.mark.parametrize(
    "arguments",
    [["--seeed", "5"], ["--out_dir", "x"], ["--num_samples", "0"], ["--device", "cuda:7"], ["--spacing", "1"]],
)
@pytest.mark.integration
def test_the_command_ends_in_one_line_before_anything_is_read(arguments, tmp_path):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(INFERENCE)]
    command += ["--dataset_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and arguments[0].strip("-") in result.stderr
    assert not (tmp_path / "out").exists()


def test_allowed_values_are_said_in_words():
    assert SETTINGS["num_samples"].allowed == "a whole number from 1 to 64"
    assert SETTINGS["hu_window"].allowed == "2 increasing numbers"
    assert SETTINGS["memory_limit"].allowed == "a number of at least 0.1, or null"
    assert Setting("str", "", choices=("a", "b")).allowed == "one of a, b"


def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are():
    with pytest.raises(InputError, match="--device cuda:99: this machine has .* CUDA devices; give cpu"):
        SETTINGS["device"].parse("device", "cuda:99")
