"""The configs: what they share is equal, and MONAI finds in them what it looks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, ramp, save, tiny_network
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata

from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.networks.weights import read_weights, save_weights

STAGES = ("train", "train+train_autoencoder", "train+finetune")
CONFIGS = {name: [ROOT / "configs" / f"{part}.yaml" for part in name.split("+")] for name in ("inference", *STAGES)}
# the two copies of what the weights depend on, in train.yaml and inference.yaml
SHARED = (
    "spacing", "mr_window", "mr_reference", "hu_window", "attention_window", "latent_channels", "autoencoder_channels",
    "autoencoder_blocks", "stem", "wavelet", "group_width", "denoiser_channels", "dsca", "prediction",
    "num_train_timesteps", "beta_end",
)  # fmt: skip
OVERLAYS = [
    ROOT / "configs" / f"{name}.yaml" for name in ("train_autoencoder", "finetune", "equal_time", "multi_gpu_train")
]
INFER_IDS = "bundle_root device dataset_dir output_dir dataset evaluator network_def inferer"
TRAIN_IDS = "bundle_root device dataset_dir train#trainer train#dataset train#inferer train#handlers"


def parsed(name: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(path) for path in CONFIGS[name]])
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

    autoencoder_weights = tmp_path_factory.mktemp("weights") / "autoencoder.pt"
    save_weights(tiny_network().autoencoder, autoencoder_weights)

    def make(name: str) -> ConfigWorkflow:
        autoencoder, denoiser = TINY["network_def#autoencoder"], TINY["network_def#denoiser"]
        networks = {
            "inference": {**TINY, "checkpoint": str(checkpoint)},
            "train": {
                "denoiser": denoiser,
                "network_def#autoencoder": autoencoder,
                "autoencoder_checkpoint": str(autoencoder_weights),
            },
            "train+train_autoencoder": {"network_def": autoencoder},
        }[name]
        made = ConfigWorkflow(
            config_file=[str(path) for path in CONFIGS[name]],
            workflow_type="infer" if name == "inference" else "train",
            logging_file=False, dataset_dir=str(data), output_dir=str(tmp_path_factory.mktemp("out")),
            device="$torch.device('cpu')", **networks,
        )  # fmt: skip
        made.initialize()
        return made

    return make


@pytest.mark.parametrize("name", ["inference", "train", "train+train_autoencoder"])
def test_monais_property_check_is_clean(workflow, name):
    assert workflow(name).check_properties() == []


@pytest.mark.parametrize("parameter", SHARED)
def test_what_the_weights_depend_on_is_equal_in_training_and_inference(parameter):
    assert parsed("inference")[parameter] == parsed("train")[parameter]


def test_the_network_is_built_alike_in_training_and_inference():
    training, inference = parsed("train"), parsed("inference")
    inference_network = {**inference["network_def"], **inference["network_def"].pop("schedule", {})}
    for name, value in training["network_def"]["autoencoder"].items():
        assert inference_network["autoencoder"][name] == value
    denoiser = {key: value for key, value in training["denoiser"].items()}
    assert inference_network["denoiser"] == denoiser
    assert {key: inference_network[key] for key in training["schedule"] if key != "_target_"} == {
        key: value for key, value in training["schedule"].items() if key != "_target_"
    }


def test_the_constructors_defaults_the_configs_and_the_weights_are_one_network(tmp_path):
    built = parsed("inference")
    network = built.get_parsed_content("network_def").state_dict()
    default = Synthesizer().state_dict()
    assert {name: value.shape for name, value in network.items()} == {n: v.shape for n, v in default.items()}
    state, trained_with = read_weights(ROOT / "models" / "model.pt")
    assert state.keys() == default.keys()
    assert (
        trained_with == built.get_parsed_content("trained_with") == parsed("train").get_parsed_content("trained_with")
    )
    assert built.get_parsed_content("network_def").denoiser.window == Synthesizer().denoiser.window
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())["network_data_format"]
    assert metadata["post_processed_outputs"]["pred"]["value_range"] == built["hu_window"]
    unit = built.get_parsed_content("network_def").downsampling
    assert metadata["inputs"]["image"]["spatial_shape"] == [f"{unit}*n"] * 3


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_repeats_nothing_of_the_config_under_it(path):
    """Settings with the value that they have anyway are a second place for them."""
    base = {**ConfigParser.load_config_file(str(ROOT / "configs/train.yaml"))}
    repeated = [
        name for name, value in ConfigParser.load_config_file(str(path)).items()
        if name in base and base[name] == value and name != "num_train_timesteps"
    ]  # fmt: skip
    assert repeated == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_expressions_are_no_programs(path):
    """A lambda may call something by its name; imports by hand, positions and MONAI's internals have no place."""
    for _, value in _items(ConfigParser.load_config_file(str(path))):
        for word in ("__local_refs", "import_module", "handlers#3", " else ", "os.environ"):
            assert word not in str(value), value
        assert not re.fullmatch(r"\$@\w+", str(value)), f"{value}: a reference needs no $"


def test_training_and_inference_read_volumes_by_the_same_transform():
    keys = {**dict.fromkeys(STAGES, "read"), "inference": "preprocessing#transforms#1"}
    for name, key in keys.items():
        assert parsed(name)[key]["_target_"] == "custom_modules.data.transforms.Preprocess"


def test_training_and_inference_scale_the_mr_alike():
    inference = parsed("inference")["preprocessing#transforms#2"]
    assert inference["keys"] == "image"
    for name in STAGES:
        assert parsed(name)["normalize#0"] == inference


@pytest.mark.parametrize(
    ("name", "identifier"),
    [("inference", i) for i in INFER_IDS.split()] + [(name, i) for name in STAGES for i in TRAIN_IDS.split()],
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
