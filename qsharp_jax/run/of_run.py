"""The models of a run, for commands that take those in folders as well."""

import dataclasses
import functools

from jax.sharding import Mesh

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.models import quantized
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import models
from qsharp_jax.run.config import trains_policy
from qsharp_jax.run.session import Session
from qsharp_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class RunModels:
    """The models of a run, with the interface of `Folders`."""

    session: Session

    @property
    def mesh(self) -> Mesh | None:
        return self.session.decode_mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return models.tokenizer(self.session)

    @property
    def configs(self) -> dict[str, DecoderConfig]:
        return models.trunk_configs(self.session)

    @property
    def weights(self) -> dict[str, Params]:
        return models.weights(self.session)

    @property
    def sampling(self) -> Sampling:
        return models.sampling(self.session)

    @functools.cached_property
    def _ref(self) -> LanguageModel:
        return models.load_ref(self.session)

    def load_ref(self) -> LanguageModel:
        return self._ref

    def load_guide(self) -> ValueModel | LanguageModel:
        is_policy = trains_policy(self.session.config)
        return quantized.model(models.load_guide(self.session, ref=self._ref if is_policy else None))
