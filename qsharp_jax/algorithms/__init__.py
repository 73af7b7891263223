"""One file an algorithm, each read like its paper's box; `get` finds one by its name in `config.algorithm`.

Each has `run(session, ref, after_round) -> guide`: all rounds, from what lies in the workdir on; `after_round` is told
each round's number and guide. The guide is a `ValueModel`, or of a method that trains the policy itself a
`LanguageModel`.
"""

from types import ModuleType

from qsharp_jax.algorithms import dpo, klq, ppo, qsharp, reinforce

__all__ = ["get"]

_MODULES = {"qsharp": qsharp, "reinforce": reinforce, "ppo": ppo, "dpo": dpo, "rpo": dpo, "klq": klq}


def get(name: str) -> ModuleType:
    return _MODULES[name]
