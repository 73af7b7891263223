"""A run: its config and workdir, its seeds, and its meshes of devices."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qsharp_jax.models import meshes, precision, sharding
from qsharp_jax.run.workdir import Workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """A run in its workdir.

    Attributes:
      profile: each training writes a trace of some steps.
      rewards: the reward functions, where the config names Python objects.
    """

    workdir: Workdir
    profile: bool = False
    rewards: Sequence[Callable[..., Any]] = ()

    @property
    def config(self) -> ConfigDict:
        return self.workdir.config

    def profile_folder(self, phase: str) -> Path | None:
        """Return the folder for the trace of a training; None without `profile`."""
        return self.workdir.profile(phase) if self.profile else None

    # --- Seeds ------------------------------------------------------------------------------------------------------

    def seed(self, name: str) -> int:
        """Return the seed for one use, so that no two uses share random numbers."""
        return zlib.crc32(f"{self.config.seed}/{name}".encode())

    def key(self, name: str) -> jax.Array:
        """Return the key for one use. Its implementation does not depend on the process's default."""
        return jax.random.key(self.seed(name), impl="threefry2x32")

    # --- Meshes -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def fit_mesh(self) -> Mesh | None:
        return meshes.preset_mesh(self.config.mesh, "fit")

    @functools.cached_property
    def decode_mesh(self) -> Mesh | None:
        return meshes.preset_mesh(self.config.mesh, "decode")

    @property
    def hosts_per_group(self) -> int:
        """Number of processes that decode as one; groups of this size share the prompts."""
        return 1 if self.decode_mesh is None else len({d.process_index for d in self.decode_mesh.devices.flat})

    @contextlib.contextmanager
    def fitting(self, dtype: str) -> Iterator[None]:
        """A context in which the mesh for fitting, if any, and the precision of a computation in `dtype` are set."""
        on_mesh = contextlib.nullcontext() if self.fit_mesh is None else jax.set_mesh(self.fit_mesh)
        with on_mesh, precision.of(dtype):
            yield

    def decoding(self) -> contextlib.AbstractContextManager:
        """Return a context in which the mesh for decoding, if any, is set."""
        return contextlib.nullcontext() if self.decode_mesh is None else jax.set_mesh(self.decode_mesh)

    def for_fitting(self, model: Any) -> Any:
        """Move a model, arrays or shapes, to the mesh for fitting."""
        return sharding.move(model, self.fit_mesh, sharding.FIT)

    def for_decoding(self, model: Any) -> Any:
        """Move a model, arrays or shapes, to the mesh for decoding."""
        return sharding.move(model, self.decode_mesh, sharding.DECODE)
