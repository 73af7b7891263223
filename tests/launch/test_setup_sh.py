"""launch/setup.sh: what is installed where, with one JAX plugin in an environment."""

import pytest


def has_driver(world, version: str):
    world.put("nvidia-smi", f'#!/bin/sh\n[ "$1" = -L ] || echo {version}\n')


def has_none(world):
    world.put("nvidia-smi", "#!/bin/sh\nexit 9\n")


def install(world, plugin: str):
    """Leave what pip leaves of JAX's plugin in the environment; the fake pip does not."""
    site_packages = world.repo / ".venv" / "lib" / "python3.13" / "site-packages"
    (site_packages / f"jax_{plugin}_plugin-0.10.0.dist-info").mkdir(parents=True)


@pytest.mark.parametrize(
    ("plugin", "driver", "words", "extras"),
    [
        ("cuda13", None, ["cuda"], "cuda13"),  # a login node, after a node with GPUs
        ("cuda12", "580.1", [], "cuda"),  # and the other way round
        ("cuda12", "580.1", ["cuda", "gcs"], "cuda,gcs"),
        ("cuda13", "580.1", ["bench"], "cuda13,bench"),
        ("cuda13", None, ["gcs"], "gcs"),
    ],
)
def test_an_environment_keeps_the_cuda_that_it_has(world, plugin, driver, words, extras):
    assert world.run("setup.sh").returncode == 0
    install(world, plugin)
    (has_none if driver is None else lambda world: has_driver(world, driver))(world)
    done = world.run("setup.sh", *words)
    assert done.returncode == 0, done.stderr
    assert world.lines("installed") == [str(world.repo), f"{world.repo}[{extras}]"]


@pytest.mark.parametrize(
    ("driver", "extras", "folder"), [("570.86", "test", ".venv-test"), ("580.1", "cuda13,test", ".venv")]
)
def test_the_tests_torch_is_not_installed_beside_cuda_12(world, driver, extras, folder):
    has_driver(world, driver)
    world.run("test.sh")  # the fake interpreter has no pytest
    assert world.lines("installed") == [f"{world.repo}[{extras}]"]
    assert [path.name for path in world.repo.glob(".venv*") if path.is_dir()] == [folder]
    world.run("test.sh", QSHARP_VENV="mine")
    assert (world.repo / "mine" / "bin" / "python").exists()


def test_the_tests_leave_an_environment_with_cuda_12_alone(world):
    assert world.run("setup.sh").returncode == 0
    install(world, "cuda12")
    world.run("test.sh")
    assert world.lines("installed") == [str(world.repo), f"{world.repo}[test]"]
    assert (world.repo / ".venv-test" / "bin" / "python").exists()


def test_on_the_cpu_by_choice_no_accelerators_jax_is_installed(world):
    has_driver(world, "580.1")
    assert world.run("setup.sh", JAX_PLATFORMS="cpu").returncode == 0
    assert world.lines("installed") == [str(world.repo)]
