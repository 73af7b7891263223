"""Settings shared by the paper's tables (arXiv 2502.20548, Section 5.2): its hyperparameters, models in folders.

The rows are the files in gsm8k/, math/, aime/ and quality/. Given the models' folders, run a row by

    qsharp run --config configs/math/llama31_8b.py --config.ref=DIR --config.guide=DIR --workdir DIR

on one accelerator, or with --config.mesh=NAME; the data come from the hub, or from --config.task.data=DIR. The paper's
program gives tokens that are not scored the log-weight of reward 0: --config.generate.others=zero.
"""

from ml_collections import ConfigDict

from qsharp_jax.run.schema import default_config

PROBLEMS = {  # training problems, and test problems
    "gsm8k": (6726, 1319),
    "math": (6750, 500),
    "aime": (6750, 30),  # the guide learns from MATH
    "quality": (2200, 2086),  # of about 2,270, since whole articles are held out for validation
}


def row(task: str, ref: str, guide: str) -> ConfigDict:
    """Return a row's config; `ref` and `guide` are the names of the models' folders."""
    c = default_config()
    del c.model, c.pretrain  # the models come from folders
    c.ref, c.guide = ref, guide
    c.dtype = "bfloat16"
    c.prompt_format = "chat"

    c.task.name = task
    c.task.data = ""  # a folder; hub; empty: the folder that QSHARP_DATA names, or the hub
    c.task.evaluate_on = "test"  # or validation, a tenth of the training problems
    c.task.split_seed = 0  # which tenth

    c.generate.temperature = 0.8
    c.generate.top_p = 0.9
    c.generate.max_new_tokens = 1024
    c.generate.prompt_bucket = 64

    c.collect.prompts, c.evaluate.problems = PROBLEMS[task]
    c.collect.samples = 16
    c.collect.drop_no_variation = True
    c.collect.batch_size = 64
    c.collect.shard_rows = 1024

    # The largest parts, and the least recomputation, for which 80 GB are enough beside the reference by `qsharp plan`;
    # eight devices still have a row each.
    c.fit.accumulate = 4
    c.fit.remat = "dots"
    c.fit.warm_start = False
    c.fit.holdout = 0.0
    c.fit.length_bucket = 256
    c.fit.save_every = 500
    c.fit.optimizer.name = "adamw"
    c.fit.optimizer.learning_rate = 2e-5
    c.fit.optimizer.b2 = 0.999
    c.fit.optimizer.clip = 5.0
    c.fit.optimizer.schedule = "constant"
    c.fit.optimizer.warmup_steps = 0

    c.evaluate.samples = c.evaluate.guided_samples = 8
    c.evaluate.etas = (0.1,)
    c.evaluate.batch_size = 64
    if task == "quality":  # prompts of some 7,000 tokens
        c.generate.prompt_bucket = 512
        c.fit.accumulate = 16  # on one device of 80 GB; 4 on eight
    return c
