"""The implementation of attention in a run's training."""

from ml_collections import ConfigDict

from qsharp_jax.models import memory
from qsharp_jax.models.attention import Attention, choose, kind_of
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.run import models
from qsharp_jax.run.config import row_width
from qsharp_jax.run.session import Session


def of_fit(session: Session) -> Attention:
    """Return the implementation of attention in training, chosen for the device and the model where it is "auto"."""
    mesh = session.fit_mesh
    device = memory.default_device() if mesh is None else mesh.devices.flat[0]
    return of_config(session.config, models.fit_config(session).trunk, kind_of(device))


def of_config(config: ConfigDict, trunk: DecoderConfig, kind: str) -> Attention:
    """Return the config's attention, or `attention.choose`'s where it is "auto", for a kind of device."""
    fit = config.fit
    if fit.attention != "auto":
        return fit.attention
    name, width = row_width(config)
    tokens = width if name == "pack_length" else config.generate.max_new_tokens
    return choose(trunk, kind, multiple=width, tokens=tokens)
