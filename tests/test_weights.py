"""Weights on disk: exact, strict, safe to load, whole or not at all."""

from __future__ import annotations

import hashlib

import pytest
import torch
from conftest import files_in, tiny_network
from torch import nn

from bundle.release.ship import ship
from custom_modules.errors import InputError
from custom_modules.networks.weights import load_weights, load_weights_or_stop, read_weights, save_weights


@pytest.fixture
def network() -> nn.Module:
    return tiny_network()


def scrambled() -> nn.Module:
    """The same network with other weights."""
    other = tiny_network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    return other


def test_single_precision_comes_back_bit_for_bit(tmp_path, network):
    save_weights(network, tmp_path / "model.pt", dtype=torch.float32)
    loaded = load_weights(scrambled(), tmp_path / "model.pt").state_dict()
    assert loaded.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_half_precision_comes_back_in_the_networks_own_as_the_nearest_half(tmp_path, network):
    save_weights(network, tmp_path / "model.pt")
    on_disk = torch.load(tmp_path / "model.pt", weights_only=True)
    loaded = load_weights(scrambled(), tmp_path / "model.pt").state_dict()
    assert {tensor.dtype for tensor in on_disk.values() if tensor.is_floating_point()} == {torch.float16}
    for name, tensor in network.state_dict().items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor.half().to(tensor.dtype)), name


def test_integers_keep_their_type(tmp_path):
    network = nn.BatchNorm3d(2)
    network.num_batches_tracked += 70000  # beyond what half precision holds
    save_weights(network, tmp_path / "model.pt")
    assert load_weights(nn.BatchNorm3d(2), tmp_path / "model.pt").num_batches_tracked == 70000


def test_latent_scale_and_hu_window_travel_with_the_weights(tmp_path, network):
    latents = torch.randn(5, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    network.set_latent_scale("CT", latents)
    save_weights(network, tmp_path / "model.pt", dtype=torch.float32)
    loaded = load_weights(tiny_network(), tmp_path / "model.pt")
    torch.testing.assert_close(loaded.latent_mean[1], latents.mean(dim=(0, 2, 3, 4)))
    torch.testing.assert_close(loaded.latent_std[1], latents.transpose(0, 1).flatten(1).std(dim=1))
    assert loaded.hu_window.tolist() == [-1000, 1600]


def test_another_hu_window_is_refused(tmp_path, network):
    save_weights(network, tmp_path / "model.pt")
    other = tiny_network()
    other.hu_window.copy_(torch.tensor([-800.0, 800.0]))
    with pytest.raises(InputError, match=r"-1000.*1600.*-800.*800"):
        load_weights(other, tmp_path / "model.pt")


TRAINED_WITH = {"spacing": [2.0, 2.0, 2.0], "mr_window": (0.0, 1250.0), "attention_window": 64}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"spacing": [1.0, 1.0, 1.0]}, r"spacing \[2.0, 2.0, 2.0\], not \[1.0, 1.0, 1.0\]"),
        ({"mr_window": [0, 500]}, "mr_window"),
        ({"attention_window": 128}, "attention_window 64, not 128"),
    ],
)
def test_weights_refuse_other_settings_than_they_were_trained_with(tmp_path, network, other, message):
    path = tmp_path / "model.pt"
    save_weights(network, path, trained_with=TRAINED_WITH)
    load_weights(tiny_network(), path, {**TRAINED_WITH, "mr_window": [0, 1250], "something_new": 1})
    load_weights(tiny_network(), path)
    with pytest.raises(InputError, match=f"{path}: trained with .*{message}") as error:
        load_weights(tiny_network(), path, {**TRAINED_WITH, **other})
    assert "\n" not in str(error.value)


def test_shipping_copies_the_weights_of_any_network_and_what_they_were_trained_with(tmp_path):
    network = nn.Conv3d(1, 2, 3)
    save_weights(network, tmp_path / "run.pt", torch.float32, TRAINED_WITH)
    ship(str(tmp_path / "run.pt"), str(tmp_path / "model.pt"))
    state, trained_with = read_weights(tmp_path / "model.pt")
    assert trained_with["mr_window"] == [0.0, 1250.0] and torch.equal(state["weight"], network.weight.half())


def test_shipping_several_weights_ships_their_mean_and_refuses_others(tmp_path):
    networks = [nn.Conv3d(1, 2, 3) for _ in range(2)]
    for name, network in zip("ab", networks):
        save_weights(network, tmp_path / f"{name}.pt", torch.float32, TRAINED_WITH)
    ship(f"{tmp_path}/a.pt, {tmp_path}/b.pt", str(tmp_path / "model.pt"))
    state, trained_with = read_weights(tmp_path / "model.pt")
    torch.testing.assert_close(state["weight"], ((networks[0].weight + networks[1].weight) / 2).half())
    assert trained_with["mr_window"] == [0.0, 1250.0]
    save_weights(nn.Conv3d(1, 3, 3), tmp_path / "c.pt", torch.float32, TRAINED_WITH)
    save_weights(networks[0], tmp_path / "d.pt", torch.float32, {**TRAINED_WITH, "mr_window": [0, 900]})
    for name in "cd":
        with pytest.raises(InputError, match=f"{name}.pt: of another network or other settings than .*a.pt"):
            ship([f"{tmp_path}/a.pt", f"{tmp_path}/{name}.pt"], str(tmp_path / "other.pt"))
    assert not (tmp_path / "other.pt").exists()


def test_the_mean_of_weights_with_and_without_the_latent_of_air_has_it(tmp_path, network):
    network.set_air_latent(network.autoencoder)
    save_weights(network, tmp_path / "new.pt", torch.float32)
    older = {key: value for key, value in network.state_dict().items() if key != "air"}
    save_weights(older, tmp_path / "old.pt", torch.float32)
    for paths in ("old.pt new.pt", "new.pt old.pt"):
        ship([str(tmp_path / name) for name in paths.split()], str(tmp_path / "model.pt"))
        torch.testing.assert_close(read_weights(tmp_path / "model.pt")[0]["air"], network.air.half())


def test_the_answer_is_the_sha256_of_the_file(tmp_path, network):
    path = tmp_path / "new" / "model.pt"
    assert save_weights(network, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert files_in(tmp_path) == ["new/model.pt"]


def edited(network: nn.Module, edit) -> dict:
    state = dict(network.state_dict())
    edit(state, list(state)[-1])
    return state


@pytest.mark.parametrize(
    "edit",
    [
        lambda state, name: state.pop(name),
        lambda state, name: state.update(another=torch.zeros(1)),
        lambda state, name: state.update({name: torch.zeros(3, 3)}),
    ],
    ids=["a key is missing", "a key too many", "another shape"],
)
def test_a_state_dict_that_does_not_fit_is_refused(tmp_path, network, edit):
    torch.save(edited(network, edit), tmp_path / "model.pt")
    with pytest.raises(InputError, match="another network") as error:
        load_weights(tiny_network(), tmp_path / "model.pt")
    assert str(error.value).startswith(f"{tmp_path / 'model.pt'}: ") and "\n" not in str(error.value)


class Payload:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="not readable as weights"):
        load_weights(tiny_network(), tmp_path / "model.pt")
    assert files_in(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_is_refused(tmp_path, network, content):
    save_weights(network, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match="not readable as weights") as error:
        load_weights(tiny_network(), tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_ends_the_program_with_one_line(tmp_path, network):
    with pytest.raises(SystemExit) as end:
        load_weights_or_stop(network, tmp_path / "none.pt")
    assert end.value.code.startswith(f"error: {tmp_path / 'none.pt'}: ") and "\n" not in end.value.code


def test_weights_that_do_not_fit_leave_the_program_by_one_line(tmp_path, network):
    save_weights(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(SystemExit) as end:
        load_weights_or_stop(network, tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in end.value.code and "\n" not in end.value.code


def test_a_failure_to_save_leaves_what_was_there(tmp_path, network, monkeypatch):
    path = tmp_path / "model.pt"
    save_weights(network, path)
    before = path.read_bytes()

    def fails_half_way(state, path):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fails_half_way)
    with pytest.raises(OSError, match="No space"):
        save_weights(scrambled(), path)
    assert path.read_bytes() == before
    assert files_in(tmp_path) == ["model.pt"]
