"""FLOPs against XLA's own count and a published size, and a clock that asynchronous steps do not flatter."""

import functools
import time

import helpers
import jax
import numpy as np
import optax
import pytest

from qsharp_jax import train
from qsharp_jax.data.batches import Batch, Example, make_batch, make_packed_batch
from qsharp_jax.models import config as model_configs
from qsharp_jax.models import decoder, value
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.train import throughput
from qsharp_jax.train.checkpoint import Checkpoints

ROWS, WIDTH = 2, 64
SHAPES = {
    "gpt2": dict(
        size="gpt2-small", vocab_size=300, embed=96, layers=2, heads=4, kv_heads=4, head_dim=24, mlp=384,
        max_positions=WIDTH,
    ),
    "grouped queries, not tied": dict(
        size="llama3-1b", vocab_size=300, embed=96, layers=2, heads=6, kv_heads=2, head_dim=32, mlp=256,
        max_positions=WIDTH, tied=False,
    ),
}  # fmt: skip


def full_batch() -> Batch:
    """Every position a token of its row's one sequence, as XLA's count knows no padding."""
    tokens = np.random.default_rng(0).integers(1, 300, (ROWS, WIDTH)).tolist()
    return make_batch([Example(row[:1], row[1:], 1.0) for row in tokens], ROWS, WIDTH)


def lowered_flops(loss_fn, make_params) -> float:
    """FLOPs of loss and gradient, as XLA counts them: layers unrolled, since it counts the body of a loop once."""
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return step.lower(jax.eval_shape(make_params), jax.tree.map(jax.numpy.asarray, full_batch())).cost_analysis()[
        "flops"
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_a_language_model_s_flops_are_nearly_all_that_xla_counts(name):
    config = model_configs.make(**SHAPES[name])
    counted = lowered_flops(
        functools.partial(train.language_model_loss, config=config),
        lambda: decoder.unstack(decoder.init(jax.random.key(0), config)),
    )
    assert 0.9 < train.language_model_flops(config)(full_batch()) / counted < 1.01


@pytest.mark.parametrize("future", [0, 2])
@pytest.mark.parametrize("kind", ["v", "q"])
def test_a_guide_s_flops_are_nearly_all_that_xla_counts(kind, future):
    """Its trunk's, a narrow head's, and those of the heads that predict later tokens."""
    config = ValueConfig(model_configs.make(**SHAPES["gpt2"]), type=kind)

    def make_params():
        params = value.unstack(value.init(jax.random.key(0), config))
        heads = {"future": train.init_future(jax.random.key(1), future, config.trunk)} if future else {}
        return params | heads

    counted = lowered_flops(functools.partial(train.value_loss, config=config), make_params)
    assert 0.85 < train.guide_flops(config, future)(full_batch()) / counted < 1.01


def test_llama_3_8b_has_its_published_parameters():
    """8,030,261,248 in all; neither the embedding nor the 65 norms are multiplied with tokens."""
    config = model_configs.make("llama3-8b")
    batch = make_batch([Example([1], [2] * 999)], 1, 1024)
    multiplied = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    expected = 6 * multiplied * 1000 + 12 * 32 * 4096 * 1000**2
    assert train.language_model_flops(config)(batch) == pytest.approx(expected, rel=1e-12)


def test_packed_and_padded_rows_count_each_sequence_for_itself():
    rng = np.random.default_rng(0)
    groups = [helpers.random_examples(rng, count=count) for count in (1, 3, 0, 2)]
    batch = make_packed_batch(groups, 5, 40)
    lengths = [len(example) for group in groups for example in group]
    expected = sum(6 * 1000 * n + 12 * 50 * n * n for n in lengths)
    assert throughput.step_flops(batch, matmul_parameters=1000, attention=50) == expected


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("cpu", None), ("NVIDIA V1000", None),
    ],
)  # fmt: skip
def test_peaks(kind, teraflops):
    assert throughput.device_peak(kind) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


class Device:
    """Time that passes when it is told to, and a device that is busy until some time."""

    def __init__(self, monkeypatch):
        self.now, self.busy_until = 0.0, 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def is_ready(self) -> bool:  # as the metrics of its last step
        return self.now >= self.busy_until

    def dispatch(self, host: float, runs: float) -> None:
        self.now += host
        self.busy_until = max(self.now, self.busy_until) + runs

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)


class Slow:
    """Batches of 8 tokens in 4 x 8 that take a while to make."""

    def __init__(self, device, seconds):
        self._device, self._seconds = device, seconds

    def __getitem__(self, step):
        self._device.now += self._seconds
        return make_batch([Example([1] * 4, [2] * 4)], 4, 8)


def timed(monkeypatch, fetch: float, host: float, runs: float, compile: float = 20.0, steps: int = 10, flops=None):
    """Two laps of so many steps; the first step compiles. Returns both, and the wall time of all."""
    device = Device(monkeypatch)
    clock = throughput.Clock(flops)
    device.now += 5.0  # reads a checkpoint
    clock.start({"x": jax.numpy.zeros(1)})
    laps, last = [], {}
    for _ in range(2):
        for _ in range(steps):
            batch = Slow(device, fetch)[0]
            with clock.step(batch, last):
                device.dispatch(host + compile, runs)
            last, compile = {"loss": device}, 0.0
        device.wait()
        laps.append(clock.lap())
    return *laps, device.now


def test_steps_that_hide_their_inputs_are_all_useful(monkeypatch):
    """Batches take 0.3 s while the device computes for 1 s: but for the first of a lap, nobody waits for them."""
    first, second, wall = timed(monkeypatch, fetch=0.3, host=0.0, runs=1.0)
    assert wall == pytest.approx(5 + 20 + 2 * 0.3 + 20)
    assert [lap["tokens_per_second"] for lap in (first, second)] == [pytest.approx(8)] * 2
    assert first["goodput"] == pytest.approx(10 / (5 + 20 + 0.3 + 10)) and second["goodput"] == pytest.approx(20 / wall)


def test_waits_for_inputs_are_lost(monkeypatch):
    """Batches take 3 s and steps 1: three quarters of the time go by waiting, though the tokens' rate is the steps'.

    Of the 3 s, one is spent while a step runs: it is counted as lost, since the device was done before the batch was.
    """
    first, second, wall = timed(monkeypatch, fetch=3.0, host=0.0, runs=1.0)
    assert wall == pytest.approx(5 + 20 + 2 * (10 * 3 + 1))
    assert second["goodput"] == pytest.approx(2 / wall) and second["tokens_per_second"] == pytest.approx(80)


def test_flops_are_divided_by_the_time_of_steps_and_by_the_peak_where_it_is_known(monkeypatch):
    for peak, mfu in ((1e12, {"mfu": pytest.approx(0.2)}), (None, {})):
        monkeypatch.setattr(throughput, "device_peak", lambda kind, peak=peak: peak)
        _, lap, _ = timed(monkeypatch, fetch=0.0, host=0.0, runs=0.5, flops=lambda batch: 1e11)
        assert lap["flops_per_second"] == pytest.approx(2e11)
        assert {name: lap[name] for name in lap if name == "mfu"} == mfu


def test_evaluations_and_saves_are_lost(monkeypatch):
    device = Device(monkeypatch)
    clock = throughput.Clock()
    clock.start({"x": jax.numpy.zeros(1)})
    with clock.step(Slow(device, 0.0)[0], {}):
        device.dispatch(0.0, 2.0)
    device.wait()
    with clock.lost():
        device.now += 6.0
    assert clock.lap()["goodput"] == pytest.approx(0.25)
    with pytest.raises(KeyboardInterrupt), clock.lost():
        raise KeyboardInterrupt


def test_a_real_training_with_slow_batches_says_so(tmp_path):
    """20 ms a batch and microseconds a step: the rate is that of the steps, and nearly all time is lost."""

    class Batches:
        def __getitem__(self, step):
            time.sleep(0.02)
            return make_batch([Example([1] * 4, [2] * 4)], 1, 8)

    lines, optimizer = [], optax.sgd(0.1)
    train.fit(
        train.init_state({"x": jax.numpy.zeros(2)}, optimizer), Batches(),
        loss_fn=lambda params, batch: (((params["x"] - 1) ** 2).sum(), {}),
        optimizer=optimizer, checkpoints=Checkpoints(tmp_path),
        loop=train.Loop(total_steps=30, log_every=10, save_every=100, name="toy", log=lines.append),
    )  # fmt: skip
    assert lines[-1]["goodput"] < 0.5 and lines[-1]["tokens_per_second"] > 2 * 8 / 0.02
