"""Which errors say that a checkpoint is damaged: those of Orbax and TensorStore, in their own words."""

import errno
import json

import pytest

from qsharp_jax.train.damage import DamagedError, is_damage, root_cause


def wrapped(error):
    """The form in which Orbax wraps what TensorStore raises for one array."""
    outer = Exception("Encountered error while reading array index: (slice(0, 2, 1),)")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        DamagedError("is damaged (its numbers are not those that were written)"),
        FileNotFoundError("Metadata file (named _METADATA) does not exist at /9/params."),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        json.JSONDecodeError("Expecting value", "", 0),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ValueError(
            'DATA_LOSS: Error opening "zarr" driver: Error decoding manifest: CRC-32C checksum verification failed'
        ),
        ValueError(
            'OUT_OF_RANGE: Error reading "x/0": Requested byte range [0, 11131) is not valid for value of size 5'
        ),
        ValueError('NOT_FOUND: Error opening "zarr" driver: Metadata at "x/.zarray" in OCDBT database does not exist'),
        ValueError("NOT_FOUND: Error reading gs://b/9/params/d/ab: [http_response_code='404']"),
        ValueError(
            'FAILED_PRECONDITION: Error reading "x/0": ZSTD_decompressStream() failed: Data corruption detected'
        ),
        ValueError('FAILED_PRECONDITION: Error reading local file "/9/params/_sharding": Invalid JSON'),
        ValueError('Error opening "zarr" driver: Error decoding b-tree node: ZSTD_decompressStream() failed'),
        wrapped(ValueError("DATA_LOSS: Error decoding chunk")),
    ],
    ids=repr,
)
def test_damage(error):
    assert is_damage(error)


@pytest.mark.parametrize(
    "error",
    [
        wrapped(ValueError("UNAVAILABLE: Error reading local file")),
        wrapped(MemoryError()),
        ValueError("NOT_FOUND"),
        ValueError("FAILED_PRECONDITION: Error reading gs://b/9/d/ab: [http_response_code='412']"),
        ValueError("FAILED_PRECONDITION: Error reading local file: Device busy [os_error_code='16']"),
        ValueError("INTERNAL: Error reading local file"),
        RuntimeError("NOT_FOUND: a kernel of XLA"),
        Exception("DATA_LOSS: of no known type"),
        KeyError("tree_metadata"),
        TypeError("a mistake in a program"),
    ],
    ids=repr,
)
def test_no_damage(error):
    assert not is_damage(error)


def test_the_root_cause_of_an_error_that_was_wrapped():
    error = ValueError("DATA_LOSS: bits")
    assert root_cause(wrapped(wrapped(error))) is error and root_cause(error) is error
