"""The configs: what they share is equal, and MONAI finds in them what it looks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, ramp, save
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata

CONFIGS = {name: ROOT / "configs" / f"{name}.yaml" for name in ("inference", "train", "train_autoencoder")}
SHARED = (
    "spacing", "mr_window", "hu_window", "roi_size", "latent_channels", "autoencoder_channels", "autoencoder_blocks",
    "stem", "wavelet",
)  # fmt: skip
DENOISER = ("denoiser_channels", "dsca", "prediction", "num_train_timesteps", "beta_end")
INFER_IDS = "bundle_root device dataset_dir output_dir dataset evaluator network_def inferer"
TRAIN_IDS = "bundle_root device dataset_dir train#trainer train#dataset train#inferer train#handlers"


def parsed(name: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS[name]))
    return parser


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A datalist of three pairs of tiny volumes."""
    folder = tmp_path_factory.mktemp("data")
    entries = []
    for number in range(3):
        entries.append({"image": f"{number}/mr.nii", "label": f"{number}/ct.nii"})
        mr = ramp((9, 8, 7), np.diag([2.0, 2, 2, 1]))
        save(folder / entries[-1]["image"], mr)
        save(folder / entries[-1]["label"], mr - 800)
    datalist = {"training": entries[:2], "validation": entries[2:]}
    (folder / "datalist.json").write_text(json.dumps(datalist))
    return folder


@pytest.fixture(scope="module")
def workflow(data, checkpoint, tmp_path_factory):
    """Make the workflow of a config, with tiny networks, on the tiny data."""

    def make(name: str) -> ConfigWorkflow:
        autoencoder, denoiser = TINY["network_def#autoencoder"], TINY["network_def#denoiser"]
        networks = {
            "inference": {**TINY, "checkpoint": str(checkpoint)},
            "train": {"denoiser": denoiser, "network_def#autoencoder": autoencoder},
            "train_autoencoder": {"network_def": autoencoder},
        }[name]
        made = ConfigWorkflow(
            config_file=str(CONFIGS[name]), workflow_type="infer" if name == "inference" else "train",
            logging_file=False, dataset_dir=str(data), output_dir=str(tmp_path_factory.mktemp("out")),
            device="$torch.device('cpu')", **networks,
        )  # fmt: skip
        made.initialize()
        return made

    return make


@pytest.mark.parametrize("name", list(CONFIGS))
def test_monais_property_check_is_clean(workflow, name):
    assert workflow(name).check_properties() == []


@pytest.mark.parametrize("parameter", SHARED)
def test_what_weights_depend_on_is_equal_in_all_configs(parameter):
    values = {name: parsed(name)[parameter] for name in CONFIGS}
    assert len({str(value) for value in values.values()}) == 1, values


@pytest.mark.parametrize("parameter", DENOISER)
def test_what_the_denoiser_depends_on_is_equal_in_training_and_inference(parameter):
    assert parsed("inference")[parameter] == parsed("train")[parameter]


def test_windows_are_numbers():
    for parameter, size in {"spacing": 3, "roi_size": 3, "mr_window": 2, "hu_window": 2}.items():
        assert np.asarray(parsed("inference")[parameter], dtype=float).size == size


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_shared_parameters_are_used_by_reference_and_written_once(name):
    text = CONFIGS[name].read_text()
    for parameter in SHARED:
        assert text.count(f"\n{parameter}:") == 1, parameter
    for parameter in ("spacing", "mr_window"):
        assert f"@{parameter}" in text, parameter


def test_training_and_inference_read_volumes_by_the_same_transform():
    for name, key in {"train": "read", "train_autoencoder": "read", "inference": "preprocessing#transforms#1"}.items():
        assert parsed(name)[key]["_target_"] == "custom_modules.data.transforms.Preprocess"


def test_training_and_inference_scale_the_mr_alike():
    inference = parsed("inference")["preprocessing#transforms#2"]
    assert inference["keys"] == "image"
    for name in ("train", "train_autoencoder"):
        assert parsed(name)["normalize#0"] == inference


@pytest.mark.parametrize(
    ("name", "identifier"),
    [("inference", i) for i in INFER_IDS.split()]
    + [(name, i) for name in ("train", "train_autoencoder") for i in TRAIN_IDS.split()],
)
def test_the_ids_that_monai_and_monai_label_use_are_there(name, identifier):
    assert parsed(name).get(identifier) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_configs_name_only_custom_modules_monai_and_what_it_builds_on(path):
    values = ConfigParser.load_config_file(str(path))
    targets = [str(value) for key, value in _items(values) if key.endswith("_target_")]
    for target in targets:
        assert "." not in target or target.split(".")[0] in {"custom_modules", "monai", "torch", "ignite"}, target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_a_config_opens_with_a_sentence_on_what_it_runs(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first.split()) > 5


def test_the_command_of_the_bundle_finds_its_root_from_the_package(workflow):
    assert Path(workflow("inference").bundle_root) == ROOT


def test_the_metadata_passes_monais_schema(real_data, tmp_path):
    schema = real_data.parent / "zoo" / "meta_schema_20240725.json"
    if not schema.is_file():
        pytest.skip(f"needs {schema}")
    verify_metadata(meta_file=str(ROOT / "configs" / "metadata.json"), filepath=str(schema))


def _items(node, path=""):
    """All (path, value) of a config that are no containers."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _items(value, f"{path}#{key}")
    else:
        yield path, node
