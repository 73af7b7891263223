"""The presets of meshes as data, and the meshes that are made of them."""

import dataclasses
import json
import math
import re

import jax
import pytest
from helpers import refusal
from ml_collections import ConfigDict
from tpu_compiler import printed_by

from qsharp_jax.models import meshes
from qsharp_jax.run import config as configs
from qsharp_jax.run import schema
from qsharp_jax.system.errors import UserError

PRESETS = configs.presets(configs.RECIPES)
NAMES = sorted(PRESETS)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def made(name, use, **changes):
    """A preset's mesh on devices as many as it has; not TPUs, whose places in space are looked at."""
    preset = PRESETS[name] | dict(platform="cpu") | changes
    return meshes.preset_mesh(preset, use, devices_of(preset))


def devices_of(preset):
    count = preset["hosts"] * preset["devices_per_host"]
    return [Device(i, i // preset["devices_per_host"], preset["platform"]) for i in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_s_sizes_agree(name):
    """The numbers in its name, in its topology, on its hosts and on its axes are the same chips."""
    preset = PRESETS[name]
    config = configs.load("arithmetic", [f"--config.mesh={name}"])
    configs.check(config)
    assert config.mesh.to_dict() == preset and preset["name"] == name
    assert {f"mesh.{key}" for key in configs.keys(config.mesh)} == {key for key in schema.RULES if key.startswith("mesh.")}
    count = preset["slices"] * preset["hosts"] * preset["devices_per_host"]
    assert math.prod(preset["fit"].values()) == count
    assert preset["fit"]["data"] % preset["slices"] == 0
    assert math.prod(preset["decode"].values()) == preset["devices_per_host"], "each host decodes rows of its own"
    if found := re.fullmatch(r"(v\w+?)_(?:(\d+)x)?(\d+)", name):
        generation, slices, size = found.groups()
        chips = int(size) // (2 if generation in ("v4", "v5p") else 1)
        assert count == int(slices or 1) * chips
        assert preset["slices"] == int(slices or 1)
        kind, _, sides = preset["topology"].partition(":")
        assert kind == generation and math.prod(map(int, sides.split("x"))) == chips
        assert preset["devices_per_host"] == (8 if name in ("v5e_8", "v6e_8") else 4)
        assert min(preset[key] for key in ("flops", "hbm_bytes", "hbm_bandwidth", "ici_bandwidth")) > 0


def test_one_device_has_no_mesh():
    assert meshes.preset_mesh(None, "fit") is None
    for name in ("single", "cpu"):
        assert meshes.preset_mesh(PRESETS[name], "fit") is None
        assert meshes.preset_mesh(ConfigDict(PRESETS[name]), "decode") is None


def test_fitting_is_on_all_devices_and_decoding_on_one_host_or_for_large_models_on_all():
    """The order of the axes is not that of the section, which comes from JSON or from an override."""
    fit = made("v6e_16", "fit", fit=dict(tensor=2, fsdp=8, data=1))
    assert dict(fit.shape) == dict(data=1, fsdp=8, tensor=2) and fit.axis_names == ("data", "fsdp", "tensor")
    decode = made("v6e_16", "decode")
    assert dict(decode.shape) == dict(data=1, attention_data=1, tensor=4)
    assert {device.process_index for device in decode.devices.flat} == {jax.process_index()}
    together = made("v5e_16", "decode", decode=dict(data=1, attention_data=2, tensor=8))
    assert together.size == 16 and together.shape["attention_data"] == 2


@pytest.mark.parametrize(("process", "hosts"), [(0, {0, 1}), (1, {0, 1}), (2, {2, 3}), (3, {2, 3})])
def test_hosts_that_decode_together_are_next_to_each_other(monkeypatch, process, hosts):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    mesh = made("v6e_16", "decode", decode=dict(data=1, attention_data=1, tensor=8))
    assert {device.process_index for device in mesh.devices.flat} == hosts


@pytest.mark.parametrize("tensor", [2, 6, 12])
def test_decoding_on_a_part_of_a_host_or_on_hosts_that_do_not_divide_all_is_refused(tensor):
    with pytest.raises(UserError, match="v6e_16 give sizes that multiply to 4 or 8 or 16$"):
        made("v6e_16", "decode", decode=dict(data=1, attention_data=1, tensor=tensor))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hosts=4), "config.mesh is v6e_16, 1 slice with 16 devices in all, and there are 1 slice with 8"),
        (dict(platform="gpu"), "config.mesh is v6e_16, for gpu devices, but the devices here are tpu"),
        (dict(slices=2, hosts=1), "2 slices with 8 devices in all, and there are 1 slice with 8"),
        (
            dict(hosts=2, fit=dict(data=2, fsdp=8, tensor=1)),
            "data 2 x fsdp 8 x tensor 1, 16 devices; on v6e_16 give sizes that multiply to 8",
        ),
    ],
)
def test_devices_that_are_not_the_preset_s_are_refused(changes, words):
    devices = devices_of(PRESETS["v6e_8"])
    message = refusal(meshes.preset_mesh, PRESETS["v6e_16"] | changes, "fit", devices)
    assert words in message


# --- On the chips of real slices ------------------------------------------------------------------------------------


def main():
    """Of every TPU preset's meshes: sizes, hosts of the decode mesh, slices and hosts along an axis, as JSON."""
    from qsharp_jax.plan import compiled

    found = {}
    for name, preset in PRESETS.items():
        if not preset["topology"]:
            continue
        devices = compiled.devices(preset)
        fit, decode = (meshes.preset_mesh(preset, use, devices) for use in ("fit", "decode"))
        slices = lambda grid: len({getattr(device, "slice_index", None) for device in grid.flat})  # noqa: E731
        found[name] = dict(
            devices=len(devices),
            fit=dict(fit.shape),
            hosts_of_decoding=len({device.process_index for device in decode.devices.flat}),
            slices_of_a_data_group=slices(fit.devices[0]),
            slices=slices(fit.devices),
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()


@pytest.mark.slow
def test_every_tpu_preset_s_slice_is_known_to_the_compiler():
    """And only `data` goes from slice to slice, and decoding stays on a host."""
    found = printed_by(__file__)
    assert set(found) == {name for name, preset in PRESETS.items() if preset["platform"] == "tpu"}
    for name, mesh in found.items():
        preset = PRESETS[name]
        assert mesh["devices"] == preset["slices"] * preset["hosts"] * preset["devices_per_host"], name
        assert mesh["fit"] == preset["fit"] and mesh["hosts_of_decoding"] == 1, name
        assert mesh["slices"] == preset["slices"] and mesh["slices_of_a_data_group"] == 1, name
