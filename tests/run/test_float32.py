"""Programs of float32 models ask for float32 products, in the lowered text; those of bfloat16 models for nothing."""

import dataclasses
import functools
import re
from unittest import mock

import helpers
import jax
import numpy as np
import pytest

from qsharp_jax import decoding, train
from qsharp_jax.data.batches import Example, make_batch
from qsharp_jax.evaluation import score
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling

BATCH = make_batch([Example([1, 2, 3], [4, 5], 1.0)], 1, 6)


def models(dtype):
    ref = helpers.random_model(11, layers=2)
    guide = helpers.random_guide(ref.config)
    config = dataclasses.replace(ref.config, dtype=dtype)
    return ref.replace(config=config), ValueModel(guide.params, ValueConfig(config))


def lowered_prefill(dtype, chunk):
    ref, _ = models(dtype)
    return decoding.prefill.lower(ref.params, ref.config, np.ones((1, 6), int), np.zeros(1, int), size=8, chunk=chunk)


def lowered_decode(dtype):
    def prefill(params, config, tokens, start, **sizes):
        real = functools.partial(decoding.prefill, config=config, **sizes)
        return jax.eval_shape(real, params, tokens=tokens, start=start)

    with mock.patch.object(decoding.loop, "prefill", prefill):
        run = decoding.Run(*models(dtype), [[1, 2]], Sampling(eta=0.1, max_new_tokens=2, top_k_candidates=3), rng=0)
    return decoding.decode.lower(run.ref, run.guide, run.state, run.controls, settings=run.settings)


def lowered_fit(dtype, attention, folder):
    _, guide = models(dtype)
    optimizer = train.make_optimizer(helpers.optimizer_config())
    loss = functools.partial(train.value_loss, config=guide.config, attend_by=attention)
    step = functools.partial(train.train_step, loss_fn=loss, optimizer=optimizer)
    with helpers.session(folder).fitting(dtype):
        return jax.jit(step).lower(train.init_state(guide.params, optimizer), BATCH, 1.0)


LOWERED = {
    "prefill": lambda dtype, folder: lowered_prefill(dtype, 8),
    "prefill in chunks": lambda dtype, folder: lowered_prefill(dtype, 4),
    "decode": lambda dtype, folder: lowered_decode(dtype),
    "values": lambda dtype, folder: score._means.lower(models(dtype)[1], BATCH),
    "log_probs": lambda dtype, folder: score._log_probs.lower(models(dtype)[0], BATCH, vocab_size=11),
    "fit": lambda dtype, folder: lowered_fit(dtype, "xla", folder),
    "fit in blocks": lambda dtype, folder: lowered_fit(dtype, "blocks", folder),
}


@pytest.mark.parametrize("program", LOWERED)
def test_products_are_as_precise_as_the_dtype(program, tmp_path):
    for dtype, expected in (("float32", "HIGHEST"), ("bfloat16", "DEFAULT")):
        products = re.findall(r"dot_general .*", LOWERED[program](dtype, tmp_path / dtype).as_text())
        assert len(products) > 5, program
        assert {precision for line in products for precision in re.findall(r"HIGHEST|HIGH|DEFAULT", line)} == {expected}
