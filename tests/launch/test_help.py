"""The launchers' `--help` names every option that they take."""

import pytest


@pytest.mark.parametrize("program, fewest", [("tpu.sh", 9), ("cuda.sh", 6)])
def test_help_is_complete(world, program, fewest):
    done = world.run(program, "--help")
    text = (world.repo / "launch" / program).read_text()
    options = [
        line.split(")")[0].strip() for line in text.splitlines() if line.strip().startswith("--") and ") " in line
    ]
    assert done.returncode == 0 and len(options) >= fewest
    for option in options:
        assert option.split(" |")[0] in done.stdout
