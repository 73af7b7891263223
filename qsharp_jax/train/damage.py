"""Which errors on reading a checkpoint mean that it is damaged; all others are failures of reading, which may pass."""

import errno
import json
import re
from types import TracebackType

from qsharp_jax.system.errors import UserError, os_error_number

# A missing file, a folder in its place, and a file in place of a folder.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)

# TensorStore's codes for content that is missing, ends early, fails its checksum or does not decode. Other codes,
# UNAVAILABLE, RESOURCE_EXHAUSTED, PERMISSION_DENIED, ..., come from the disk, the network or the machine.
# INVALID_ARGUMENT is not written before its message.
_DAMAGE = re.compile(
    r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND): |FAILED_PRECONDITION: (?!.*http_response_code)|.*Error decoding", re.DOTALL
)


class DamagedError(UserError):
    """A checkpoint is damaged, or of another model."""


def is_damage(error: BaseException) -> bool:
    """Return true if an error shows damage: a checksum, shapes, a missing file, or content that does not parse."""
    error = root_cause(error)
    if isinstance(error, DamagedError | FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError):
        return True
    if (number := os_error_number(error)) is not None:
        return number in _MISSING
    if isinstance(error, ValueError) and _DAMAGE.match(str(error)):
        return True
    # Orbax has no exception of its own for metadata with a garbled key or type name.
    parsing = KeyError | TypeError | ValueError | AttributeError | NotImplementedError
    return isinstance(error, parsing) and _raised_in(error.__traceback__).startswith("orbax.checkpoint.")


def root_cause(error: BaseException) -> BaseException:
    """The error that others were raised from: Orbax wraps those of TensorStore."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _raised_in(trace: TracebackType | None) -> str:
    """The module that raised an error."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals["__name__"]
