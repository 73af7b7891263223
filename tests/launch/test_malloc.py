"""glibc's settings for arrays on the CPU: given to programs that run there, and to no others."""

import pytest

ARGUMENTS = ["--", "--config", "configs/arithmetic.py", "--workdir", "/nfs/run", "--config.mesh=cuda_8"]
ON_CPU = (
    "MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864 MALLOC_TRIM_THRESHOLD_=8589934592"
)
GPU = "#!/bin/sh\necho 'GPU 0: NVIDIA'\n"


@pytest.mark.parametrize(
    ("gpu", "platforms", "expected"),
    [(False, "", ON_CPU), (True, "", ""), (True, "cpu", ON_CPU), (True, "cuda,cpu", ""), (False, "tpu,cpu", "")],
)
def test_this_machines_run_has_them_if_it_is_on_the_cpu(world, gpu, platforms, expected):
    """JAX_PLATFORMS decides where it is set, else whether there is an accelerator."""
    if gpu:
        world.put("nvidia-smi", GPU)
    done = world.run("local.sh", FAKE_PROGRAM="0", JAX_PLATFORMS=platforms)
    assert done.returncode == 0, done.stderr
    assert [start["malloc"] for start in world.started()] == [expected]


@pytest.mark.parametrize(("platforms", "expected"), [("", ""), ("cpu", ON_CPU)])
@pytest.mark.parametrize("hosts", [[], ["--hosts", "box1,box2"]])
def test_cuda_sh_gives_them_to_cpu_runs_alone_here_and_by_ssh(world, platforms, expected, hosts):
    world.put("nvidia-smi", GPU)
    world.play(2, [], [["0", "0"]])
    done = world.run("cuda.sh", *hosts, *ARGUMENTS, FAKE_PROGRAM="0", JAX_PLATFORMS=platforms)
    assert done.returncode == 0, done.stderr
    assert [start["malloc"] for start in world.started()] == [expected] * max(len(hosts), 1)


@pytest.mark.parametrize(("platforms", "expected"), [("", 0), ("cpu", 4)])
def test_a_slurm_job_inherits_them_for_a_cpu_run_alone(world, platforms, expected):
    world.put("sbatch", '#!/bin/sh\nenv | grep ^MALLOC_ >"$FAKE/inherited" || true\n')
    done = world.run("cuda.sh", "--slurm", "2", "--gpus", "1", *ARGUMENTS, JAX_PLATFORMS=platforms)
    assert done.returncode == 0, done.stderr
    assert len(world.lines("inherited")) == expected


def test_a_tpu_host_does_not_get_them(world):
    world.play(2, [["READY"]], [["0", "0"]])
    done = world.run("tpu.sh", "run", "--name", "q", "--zone", "z", "--type", "v5e-16", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert [start["malloc"] for start in world.started()] == ["", ""]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_users_own_settings_win_and_on_an_accelerator_are_alone(world, gpu):
    if gpu:
        world.put("nvidia-smi", GPU)
    done = world.run("local.sh", FAKE_PROGRAM="0", MALLOC_ARENA_MAX="4")
    assert done.returncode == 0, done.stderr
    expected = "MALLOC_ARENA_MAX=4" if gpu else ON_CPU.replace("MAX=1", "MAX=4")
    assert [start["malloc"] for start in world.started()] == [expected]
