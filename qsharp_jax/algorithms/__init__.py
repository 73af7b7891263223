"""One file an algorithm, each read like its paper's box; `get` finds one by its name in `config.algorithm`.

Each has `run(session, ref, after_round) -> guide`: all rounds, from what lies in the workdir on; `after_round` is told
each round's number and guide. The guide is a `ValueModel`, or of a method that trains the policy itself a
`LanguageModel`; one that learns a value model also has `mode(config)`, how that tilts the reference.
"""

from types import ModuleType

from ml_collections import ConfigDict

from qsharp_jax.algorithms import cd, dpo, klq, ppo, qsharp, reinforce, vas

__all__ = ["check", "get"]

_MODULES = {
    "qsharp": qsharp, "cd": cd, "vas": vas, "reinforce": reinforce, "ppo": ppo, "dpo": dpo, "rpo": dpo, "klq": klq,
}  # fmt: skip


def get(name: str) -> ModuleType:
    return _MODULES[name]


def check(config: ConfigDict) -> None:
    """Raises a UserError unless the algorithm's settings go with the others."""
    module = get(config.get("algorithm", "qsharp"))
    if hasattr(module, "check"):
        module.check(config)
