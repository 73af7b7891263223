import fakes
import pytest


@pytest.fixture
def world(tmp_path):
    world = fakes.World(tmp_path / "world")
    yield world
    world.kill()
