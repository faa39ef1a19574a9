"""NumPy archives, opened so that every fault names the file. Pickled objects are never loaded."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from ispen_dist.data.errors import DataError, read_bytes

_DAMAGED = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


def open_archive(path: str | Path, keys: str) -> NpzFile:
    """Open an archive whose arrays are read one by one.

    Args:
        path: the file.
        keys: how `numpy.savez` would be given the arrays, for the message.

    Raises:
        DataError: for a file that is not there, cut off, pickled or a single array.
    """
    try:
        archive = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except DataError:
        raise
    except _DAMAGED as error:
        raise _damaged(path, "an intact npz archive", error) from None
    if not isinstance(archive, NpzFile):
        raise DataError(
            path, None, "expected an npz archive, got a single array; "
            f"write it with numpy.savez(FILE, {keys})",
        )  # fmt: skip
    return archive


def array_of(path: str | Path, archive: NpzFile, key: str) -> np.ndarray:
    """Return one array of an archive.

    Raises:
        DataError: where it is missing, damaged or pickled.
    """
    if key not in archive:
        found = ", ".join(archive.files) or "none"
        raise DataError(path, None, f"expected an array {key!r}, got {found}; rename or add it")
    try:
        return archive[key]
    except _DAMAGED as error:
        raise _damaged(path, f"an array of numbers under {key!r}", error) from None


def numbers_of(path: str | Path, archive: NpzFile, key: str, dimensions: str) -> np.ndarray:
    """Return an array of numbers with as many dimensions as there are words in `dimensions`.

    Raises:
        DataError: for another type, another number of dimensions, or an empty one.
    """
    array = array_of(path, archive, key)
    if array.dtype.kind not in "biuf":
        raise DataError(path, None, f"{key}: expected numbers, got {array.dtype}")
    if array.ndim != len(dimensions.split()) or 0 in array.shape:
        raise DataError(
            path, None, f"{key}: expected the dimensions {dimensions}, none of them empty, "
            f"got shape {array.shape}",
        )  # fmt: skip
    return array


def _damaged(path: str | Path, expected: str, error: Exception) -> DataError:
    if "pickle" in str(error):
        return DataError(
            path, None, f"expected {expected}, got pickled objects, which are never loaded because "
            "they can run code; write arrays of numbers",
        )  # fmt: skip
    return DataError(path, None, f"expected {expected}, got: {error}; write the file again")
