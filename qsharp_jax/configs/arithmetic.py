"""The main job: word problems, with a reference pre-trained by the run. Some minutes on two CPU cores.

    qsharp run --config arithmetic --workdir runs/arithmetic

learns a guide and writes report.md, in which Q# solves more test problems than the reference.
"""

from ml_collections import ConfigDict

from qsharp_jax.run.schema import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.task.name = "arithmetic"
    c.task.max_events = 3
    c.task.equation_fraction = 0.4  # fraction of pre-training texts that are bare equations
    c.task.error_scale = 1.0  # of the corpus's reading errors; 0 gives a clean corpus
    c.model.size = "tiny"

    c.generate.top_k_candidates = 5
    c.generate.max_new_tokens = 56
    c.generate.prompt_bucket = 48

    c.policy.optimizer.warmup_steps = 4  # REINFORCE makes 38 updates a round
    return c
