"""Models by their ids on the Hugging Face hub: the folder of one in the hub's cache on this machine.

An id is OWNER/NAME, or OWNER/NAME@REVISION with a branch, a tag or a commit. The variables HF_HOME, HF_HUB_OFFLINE and
HF_ENDPOINT mean what they mean to `huggingface_hub`.
"""

import contextlib
import functools
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.*",
)  # fmt: skip
TIMEOUT = 10  # seconds
_SAFETENSORS = ["*.safetensors"]
_NOT = ("*/*", "consolidated*")  # other forms of the same weights


def find(model: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model, or its GGUF file: the path if there is something; an id's copy in the hub's cache.

    What the cache lacks is downloaded: configs, tokenizer and safetensors, or the GGUF file where there are none.

    Args:
      weights: False to do without safetensors.

    Raises:
      UserError: for an id of no model that can be had, and without network and copy.
    """
    return _snapshot(str(model), weights) if is_id(model) else Path(model).expanduser()


def pin(model: str, earlier: str | None = None) -> str:
    """An id with the commit that it stands for now; anything else as it is.

    Args:
      earlier: the model of an earlier run, whose commit is kept where it is the same id and no revision is given.

    Raises:
      UserError: as `find`.
    """
    if not is_id(model):
        return model
    name, _, revision = model.partition("@")
    if not revision and earlier is not None and earlier.startswith(f"{name}@"):
        return earlier
    return f"{name}@{find(model).name}"


def is_id(model: str | Path) -> bool:
    """Tell whether a model is named by an id: no file or folder has this name, and it is not that of a GGUF file."""
    words = str(model)
    return bool(_ID.fullmatch(words)) and not words.endswith(gguf.SUFFIX) and not Path(words).exists()


@functools.cache
def _snapshot(model: str, weights: bool) -> Path:
    name, _, revision = model.partition("@")
    try:
        # `snapshot_download` alone would wait forever for a hub that does not answer.
        listed = HfApi().model_info(name, revision=revision or None, timeout=TIMEOUT).siblings or []
        files = _weights(name, [entry.rfilename for entry in listed])
        if not weights and files == _SAFETENSORS:
            files = []
        return _copy(name, revision, [*_FILES, *files])
    except GatedRepoError:
        raise UserError(
            f"the model {name} is gated; accept its terms on https://huggingface.co/{name}, and log in by"
            " `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no folder {name}, and no public model of this name on the Hugging Face hub; check the name, or"
            " log in by `hf auth login` if it is private"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"the model {name} on the Hugging Face hub has no revision {revision!r}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise UserError(
                f"the Hugging Face hub refused the model {name} (HTTP {error.response.status_code}); log in by"
                " `hf auth login`, or try again later"
            ) from None
        return _cached(model, error, weights)


def _weights(name: str, files: Sequence[str]) -> list[str]:
    """The files of weights, of those of a model on the hub: all safetensors, or else the only GGUF file."""
    files = [file for file in files if "/" not in file]
    if any(file.endswith(".safetensors") for file in files):
        return _SAFETENSORS
    files = [file for file in files if file.endswith(gguf.SUFFIX)]
    if len(files) > 1:
        raise UserError(
            f"the model {name} has {len(files)} GGUF files ({', '.join(files)}); download one by `hf download {name}"
            " FILE`, and give its path"
        )
    if not files:
        raise UserError(f"the model {name} on the Hugging Face hub has neither safetensors nor a GGUF file")
    return files


def _cached(model: str, error: Exception, weights: bool) -> Path:
    """The copy in the cache of a model that an error keeps from being downloaded."""
    name, _, revision = model.partition("@")
    with contextlib.suppress(LocalEntryNotFoundError):
        files = [*_FILES, *(_SAFETENSORS if weights else ())]
        folder = _copy(name, revision, files, local_files_only=True)
        needed = (".safetensors", gguf.SUFFIX) if weights else (".json", gguf.SUFFIX)
        if any(path.suffix in needed for path in folder.glob("*")):
            return folder
    cause = error.__cause__ or error
    offline = isinstance(cause, OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if offline else " ".join(str(cause).split())[:100] or type(cause).__name__
    raise UserError(
        f"there is no folder {model}, and the model of this name could not be fetched from the Hugging Face hub"
        f" ({reason}) and is not, or not completely, in its cache; give a folder, or download it where there is a"
        " network"
    )


def _copy(name: str, revision: str, files: Sequence[str], *, local_files_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            name, revision=revision or None, allow_patterns=list(files), ignore_patterns=list(_NOT),
            local_files_only=local_files_only,
        )
    )  # fmt: skip
