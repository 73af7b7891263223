"""One run's parts, made from its config: task, tokenizer, problems, model shapes, and the models in the workdir.

Every command starts from a `Session`. It knows which settings go together, and nothing of how an algorithm works.
"""

import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qsharp_jax import train
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import decoder, meshes, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError, nearest
from qsharp_jax.tasks import registry
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judge
from qsharp_jax.train.checkpoint import Checkpoints


def check_settings(config: ConfigDict) -> None:
    """That all settings are there, in their ranges, and go together.

    Raises:
      UserError: naming the setting, its value and what is allowed.
    """
    present, algorithm = configs.keys(config), config.get("algorithm")
    pretrained = config.get("ref") == "pretrain"
    # Sections of other commands and algorithms.
    others = {"compare", "policy", *configs.VALUE_METHODS, *configs.POLICY_METHODS} - {algorithm}
    if algorithm in configs.POLICY_METHODS:
        others.remove("policy")
    if not pretrained:
        others.add("pretrain")
    if "mesh" not in config:  # of an older version: one device
        others.add("mesh")
    asked = [key for key in configs.RULES if key.partition(".")[0] not in others]
    if "algorithm" not in config:  # of an older version: Q#
        asked.remove("algorithm")
    for key in [*asked, "task.name", *(["model.size"] if pretrained or config.get("guide") == "scratch" else [])]:
        if key not in present:
            raise UserError(f"the config lacks the setting {key}; add it, as in configs/arithmetic.py")
    for key in present:  # these are arguments of `generate`: another would be refused there, after the pre-training
        if key.startswith("generate.") and key not in configs.RULES:
            raise UserError(f"there is no setting {key}; {nearest(key, configs.RULES)}")
    configs.check(config)
    if config.fit.batch_size % config.fit.accumulate:
        raise UserError(
            f"config.fit.accumulate is {config.fit.accumulate}; it must divide config.fit.batch_size, which is"
            f" {config.fit.batch_size}"
        )
    if config.fit.patience and not config.fit.evaluate_every:
        raise UserError(
            f"config.fit.patience is {config.fit.patience} and config.fit.evaluate_every 0; patience counts"
            " evaluations, so say how many steps lie between them"
        )
    if config.fit.evaluate_every and not config.fit.holdout:
        raise UserError(
            f"config.fit.evaluate_every is {config.fit.evaluate_every} and config.fit.holdout 0; say what share of the"
            " prompts to evaluate on"
        )
    if config.collect.drop_no_variation and config.collect.samples == 1:
        raise UserError(
            "config.collect.drop_no_variation is True and config.collect.samples 1; the rewards of a problem vary only"
            " among two or more samples"
        )
    if (most := max(config.evaluate.pass_at, default=0)) > config.evaluate.samples:
        raise UserError(
            f"config.evaluate.pass_at has {most:g} and config.evaluate.samples is {config.evaluate.samples}; pass@k"
            " needs at least k samples of a problem, so give more samples, or leave that k out"
        )
    width = "pack_length" if config.fit.pack_length else "length_bucket"
    if config.fit.attention == "splash" and config.fit[width] % 128:
        raise UserError(
            f"config.fit.{width} is {config.fit[width]}, and config.fit.attention splash takes multiples of 128 tokens;"
            " give one, or another attention"
        )
    if algorithm in configs.POLICY_METHODS:
        _check_policy(config)
    try:
        registry.get(config.task.name).check(config.task)
    except ValueError as error:
        raise UserError(str(error)) from None
    except (AttributeError, TypeError) as error:  # a setting is not there, or of another type
        words = str(error).strip('"')
        raise UserError(f"the config's task section is not what {config.task.name} needs: {words}") from None


def _check_policy(config: ConfigDict) -> None:
    """That the settings of a method that trains the policy itself go together."""
    name, samples, rows = config.algorithm, config.collect.samples, config.policy.batch_size
    if config.guide != "ref":
        raise UserError(f"config.guide is {config.guide}; {name} trains a copy of the reference, so give ref")
    if config.fit.lora_rank:
        raise UserError(f"config.fit.lora_rank is {config.fit.lora_rank}; {name} trains all weights, so give 0")
    if config.generate.temperature == 0:
        raise UserError(f"config.generate.temperature is 0; {name} samples the policy that it trains, so give more")
    in_pairs = name in ("dpo", "rpo")
    if in_pairs and samples < 2:
        raise UserError(f"config.collect.samples is {samples}; {name} compares two rollouts of a prompt")
    if name == "reinforce":
        of_prompt = 1 if config.reinforce.greedy else samples
        if config.reinforce.baseline == "leave_one_out" and of_prompt < 2:
            raise UserError(
                "config.reinforce.baseline leave_one_out needs other samples of a prompt: give config.collect.samples"
                " of at least 2 and config.reinforce.greedy false, or the baseline mean"
            )
        if rows % of_prompt:
            raise UserError(
                f"config.policy.batch_size is {rows}; reinforce takes whole prompts, so a multiple of"
                f" config.collect.samples, {of_prompt}"
            )
    parts = config.fit.accumulate * (2 if in_pairs else 1)
    if rows % parts:
        raise UserError(
            f"config.policy.batch_size is {rows}; it must be a multiple of {parts}, config.fit.accumulate"
            + (" times the two rollouts of a pair" if in_pairs else "")
        )


def check(config: ConfigDict) -> None:
    """Everything about a config that can be refused before anything is computed.

    Raises:
      UserError: as `check_settings`, and for folders and models that are not what they are taken for.
    """
    check_settings(config)
    _check_rows(config)
    models.check_folders(config)
    session = Session(Workdir(Path(), config))
    try:
        models.check(config, session.text)
    except ValueError as error:
        raise UserError(str(error)) from None
    if session.trains_policy and session.ref_folder and session.ref_config.dtype == "bfloat16":
        raise UserError(
            f"config.ref is {config.ref}, read in bfloat16 for decoding alone, and {config.algorithm} trains a copy of"
            " its weights; give --config.dtype=float32"
        )
    longest = min(shape.max_positions for shape in session.configs.values())
    if (new := config.generate.max_new_tokens) >= longest:
        raise UserError(f"config.generate.max_new_tokens is {new}; it must be below the model's {longest} positions")


def _check_rows(config: ConfigDict) -> None:
    """That a mesh divides the rows of every batch that is learned from."""
    if "mesh" not in config:
        return
    data, fsdp = config.mesh.fit.data, config.mesh.fit.fsdp
    learned = "policy" if config.get("algorithm") in configs.POLICY_METHODS else "fit"
    for section in ("pretrain", learned) if config.ref == "pretrain" else (learned,):
        parts = 1 if section == "pretrain" else config.fit.accumulate
        if config[section].batch_size % (data * fsdp * parts):
            raise UserError(
                f"config.{section}.batch_size is {config[section].batch_size}; on the mesh {config.mesh.name} it must"
                f" be a multiple of {data * fsdp * parts}, which is data {data} x fsdp {fsdp}"
                + (f" x accumulate {parts}" if parts > 1 else "")
            )


def check_problems(config: ConfigDict) -> None:
    """That the task has as many problems as are asked for, and that they and the responses to them fit into the models'
    contexts and into packed rows.

    This takes seconds, so it is for new runs only. A workdir keeps its settings, so one that shows to be impossible
    after the pre-training would cost a new one.

    Raises:
      UserError: with how many there are, or how long they may be.
    """
    session = Session(Workdir(Path(), config))
    lengths = {
        problem.problem_id: len(session.text.encode_prompt(problem.prompt))
        for problem in session.all_train_problems() + session.test_problems()
    }
    longest, new = max(lengths, key=lengths.get), config.generate.max_new_tokens
    together = lengths[longest] + new
    for name, shape in session.configs.items():
        if together > shape.max_positions:
            raise UserError(
                f"the prompt of problem {longest} has {lengths[longest]} tokens, which with"
                f" config.generate.max_new_tokens = {new} are more than the {name}'s {shape.max_positions} positions;"
                " give fewer new tokens, or a model with a longer context"
            )
    if 0 < config.fit.pack_length < together:
        raise UserError(
            f"config.fit.pack_length is {config.fit.pack_length}; it must be at least {together}, the tokens of the"
            " longest prompt and config.generate.max_new_tokens, or 0"
        )


@dataclasses.dataclass(frozen=True)
class Session:
    """A run. With `profile`, each of its trainings writes a trace of some steps."""

    workdir: Workdir
    profile: bool = False

    @property
    def config(self) -> ConfigDict:
        return self.workdir.config

    @property
    def algorithm(self) -> str:
        return self.config.get("algorithm", "qsharp")  # workdirs of an older version say nothing

    @property
    def trains_policy(self) -> bool:
        """Whether what is learned is a policy, in the place of a guide."""
        return self.algorithm in configs.POLICY_METHODS

    @property
    def eta(self) -> float:
        """The KL's weight in the objective E reward - eta KL(pi || pi_ref): the algorithm's own, or collect.eta."""
        own = {"dpo": "beta", "rpo": "beta", "klq": "tau"}.get(self.algorithm)
        weight = self.config[self.algorithm][own] if own else None
        return self.config.collect.eta if weight is None else weight

    @functools.cached_property
    def task(self) -> ModuleType:
        return registry.get(self.config.task.name)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.task)

    @functools.cached_property
    def text(self) -> Tokenizer:
        return models.make_text(self.config, self.task, self.workdir.date)

    @functools.cached_property
    def ref_config(self) -> DecoderConfig:
        return models.ref_config(self.config, self.text)

    @functools.cached_property
    def guide_config(self) -> ValueConfig:
        return models.guide_config(self.config, self.text)

    @property
    def configs(self) -> dict[str, DecoderConfig]:
        """The shapes of the "reference" and of the "guide"'s trunk."""
        return {"reference": self.ref_config, "guide": self.guide_config.trunk}

    @functools.cached_property
    def fit_mesh(self) -> Mesh | None:
        return meshes.preset_mesh(self.config.get("mesh"), "fit")

    @functools.cached_property
    def decode_mesh(self) -> Mesh | None:
        return meshes.preset_mesh(self.config.get("mesh"), "decode")

    @property
    def together(self) -> int:
        """Processes that decode as one: groups of so many share the prompts."""
        return 1 if self.decode_mesh is None else len({d.process_index for d in self.decode_mesh.devices.flat})

    @property
    def fit_config(self) -> ValueConfig:
        """The guide's shape, to be computed in `fit.dtype`."""
        return self.guide_config.computed_in(self.config.fit.dtype)

    def check_devices(self) -> None:
        """That the meshes are those of the devices that are there, and that the fit's attention runs on them.

        Raises:
          UserError: saying what they need.
        """
        _ = self.fit_mesh, self.decode_mesh
        asked, platform, dtype = self.config.fit.attention, jax.default_backend(), self.fit_config.trunk.dtype
        if (needed := {"cudnn": "gpu", "splash": "tpu"}.get(asked, platform)) != platform:
            raise UserError(
                f"config.fit.attention is {asked}, which runs on a {needed}, and JAX has a {platform} here; give xla,"
                " or blocks for long sequences on a CPU"
            )
        if asked == "cudnn" and dtype != "bfloat16":
            raise UserError(
                f"config.fit.attention cudnn computes in bfloat16, and the guide is fitted in {dtype}; give"
                " --config.fit.dtype=bfloat16, or xla"
            )

    def fitting(self) -> contextlib.AbstractContextManager:
        """Inside, the mesh for fitting is set; where there is none, nothing is."""
        return contextlib.nullcontext() if self.fit_mesh is None else jax.set_mesh(self.fit_mesh)

    def decoding(self) -> contextlib.AbstractContextManager:
        """Inside, the mesh for decoding is set; where there is none, nothing is."""
        return contextlib.nullcontext() if self.decode_mesh is None else jax.set_mesh(self.decode_mesh)

    def for_fitting(self, model: Any) -> Any:
        """A model, arrays or shapes, moved to where it is fitted."""
        return sharding.move(model, self.fit_mesh, sharding.FIT)

    def for_decoding(self, model: Any) -> Any:
        """A model, arrays or shapes, moved to where it decodes."""
        return sharding.move(model, self.decode_mesh, sharding.DECODE)

    @property
    def weights(self) -> dict[str, Any]:
        """Those of the "reference" and of the "guide" as they will be loaded, as `jax.ShapeDtypeStruct`s."""
        dtype = self.ref_config.dtype if self.ref_folder else "float32"  # of what was trained here
        learned = decoder.abstract(self.ref_config) if self.trains_policy else value.abstract(self.guide_config)
        return {"reference": decoder.abstract(self.ref_config, dtype), "guide": learned}

    def seed(self, name: str) -> int:
        """A seed of its own for every use, so that no two of them share random numbers."""
        return zlib.crc32(f"{self.config.seed}/{name}".encode())

    def key(self, name: str) -> jax.Array:
        return jax.random.key(self.seed(name), impl="threefry2x32")  # whatever the process's default

    def train_problems(self, number: int) -> list[Problem]:
        """The problems of a round: new ones in each, or of a fixed data set the same in all, as in the paper."""
        if self.task.FINITE:
            return self.all_train_problems()
        count = self.config.collect.prompts
        return self.all_train_problems()[count * (number - 1) : count * number]

    def all_train_problems(self) -> list[Problem]:
        return self._all_train_problems

    def test_problems(self) -> list[Problem]:
        return self._test_problems

    @functools.cached_property
    def _all_train_problems(self) -> list[Problem]:
        rounds = 1 if self.task.FINITE else self.config.rounds
        return self._problems("train", self.config.collect.prompts * rounds)

    @functools.cached_property
    def _test_problems(self) -> list[Problem]:
        return self._problems("test", self.config.evaluate.problems)

    def _problems(self, split: str, count: int) -> list[Problem]:
        try:
            return self.task.problems(self.config.task, split, count, self.seed(split))
        except ValueError as error:
            raise UserError(f"{self.config.task.name}: {error}") from None

    def sampling(self) -> Sampling:
        """The config's section `generate`, with the tokenizer's stop ids and vocabulary."""
        settings = dict(self.config.generate)
        settings["top_k_candidates"] = min(settings["top_k_candidates"], self.text.vocab_size)
        return Sampling(**settings, stop_ids=self.text.stop_ids, vocab_size=self.text.vocab_size)

    def guide_folder(self, number: int) -> Path:
        """Where the checkpoints of a round's guide lie, or of its policy."""
        return self.workdir.guide / f"round_{number}"

    def profile_folder(self, phase: str) -> Path | None:
        """Where the trace of a training goes; None where none is wanted."""
        return self.workdir.profile(phase) if self.profile else None

    @property
    def ref_folder(self) -> Path | None:
        """The reference's own folder; None where it is pre-trained in the workdir."""
        return models.folder(self.config, "ref")

    def load_ref(self) -> LanguageModel:
        """The reference, out of its folder or as it was pre-trained.

        Raises:
          UserError: if its pre-training has not ended, or what was to be read is damaged.
        """
        if self.ref_folder:
            return models.load_ref(self.config, self.decode_mesh)
        checkpoints = _finished(self.workdir.ref, "reference model", "run")
        shapes = self.for_fitting(LanguageModel(decoder.abstract(self.ref_config), self.ref_config))
        return self.for_decoding(shapes.replace(params=checkpoints.restore_params(shapes.params)))

    def load_guide(self, number: int | None = None) -> ValueModel | LanguageModel:
        """The guide fitted in a round, by default in the last that has one; or the policy trained in it.

        Raises:
          UserError: if there is none, or the checkpoint is damaged.
        """
        number = self.fitted_rounds() or 1 if number is None else number
        if self.trains_policy:
            checkpoints = _finished(self.guide_folder(number), f"policy of round {number}", "run")
            policy = self.for_fitting(LanguageModel(decoder.abstract(self.ref_config), self.ref_config))
            return self.for_decoding(policy.replace(params=checkpoints.restore_params(policy.params)))
        checkpoints = _finished(self.guide_folder(number), f"guide of round {number}", "fit")
        shapes = value.abstract(self.guide_config)
        if offsets := self.config.fit.future_offsets:  # the auxiliary loss's heads: saved too, but not the guide's
            trunk = self.guide_config.trunk
            shapes["future"] = jax.eval_shape(lambda key: train.init_future(key, offsets, trunk), jax.random.key(0))
        model = self.for_fitting(ValueModel(shapes, self.guide_config))
        params = checkpoints.restore_params(model.params)
        return self.for_decoding(model.replace(params={name: params[name] for name in params if name != "future"}))

    def first_guide(self, ref: LanguageModel | None) -> Params:
        """The parameters that a guide starts from, if not from those of the round before; see `sources.first_guide`."""
        return models.first_guide(self.config, self.guide_config, ref, self.key("guide"), self.fit_mesh)

    def first_policy(self, ref: LanguageModel) -> Params:
        """The parameters of the copy of the reference that a policy starts as; see `sources.first_policy`."""
        return models.first_policy(self.config, ref, self.fit_mesh)

    def fitted_rounds(self) -> int:
        """How many rounds, from the first on, have a fitted guide."""
        return self._rounds(lambda number: _is_finished(self.guide_folder(number)))

    def collected_rounds(self) -> int:
        """How many rounds, from the first on, have rollouts."""
        return self._rounds(lambda number: any(self.workdir.rollouts(number).glob("shard-*.parquet")))

    def _rounds(self, done: Callable[[int], bool]) -> int:
        return sum(1 for _ in itertools.takewhile(done, range(1, self.config.rounds + 1)))


def _is_finished(folder: Path) -> bool:
    return folder.exists() and Checkpoints(folder).finished()


def _finished(folder: Path, what: str, command: str) -> Checkpoints:
    if not _is_finished(folder):
        raise UserError(f"there is no {what} in {folder}; run `qsharp {command}` on this workdir first")
    return Checkpoints(folder)
