"""A data file that cannot be used, and opening one so that every fault names file and line."""

import codecs
import difflib
import gzip
import io
import zlib
from collections.abc import Iterable
from pathlib import Path

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class DataError(ValueError):
    """A malformed data file.

    Attributes:
        path: the file.
        line: one-based line, None where it is not known or the file has no lines.
        problem: "expected ..., got ...; do ...".
    """

    def __init__(self, path: str | Path, line: int | None, problem: str) -> None:
        self.path = str(path)
        self.line = line
        self.problem = problem
        where = self.path if line is None else f"{self.path}:{line}"
        super().__init__(f"{where}: {problem}")


def open_text(path: str | Path) -> io.StringIO:
    r"""Open a text file, plain or gzip, whatever its name says.

    It is read whole, so that no fault of the file comes up later. Lines end with \n or \r\n and
    with nothing else: other characters that Unicode calls line ends occur inside tokens.

    Raises:
        DataError: for a file that is missing, a folder, empty, cut off, corrupt or not UTF-8.
    """
    return io.StringIO(read_text(path).removeprefix("\ufeff").replace("\r\n", "\n"))


def read_text(path: str | Path) -> str:
    """Return the text of a file to the byte: byte order mark and carriage returns stay.

    Raises:
        DataError: see `open_text`.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = "a UTF-16 mark" if data[:2] in _UTF16_MARKS else f"byte 0x{data[error.start]:02x}"
        raise DataError(
            path, line, f"expected text in UTF-8, got {found}; convert the file to UTF-8"
        ) from None


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file, decompressed if it begins like a gzip file.

    Raises:
        DataError: for a file that is missing, a folder, empty, cut off or corrupt.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(
            path, None, "expected a file, got nothing there; check data.root and the file name"
        ) from None
    except IsADirectoryError:
        raise DataError(path, None, "expected a file, got a folder; name a file in it") from None
    except OSError as error:
        raise DataError(
            path, None, f"expected a readable file, got: {error.strerror}; check its permissions"
        ) from None
    if data.startswith(_GZIP_MAGIC):
        data = _decompressed(data, path)
    content = data.removeprefix(codecs.BOM_UTF8)
    if not content or content.isspace():
        raise DataError(path, None, "expected data, got an empty file; fetch or write it again")
    return data


def _decompressed(data: bytes, path: str | Path) -> bytes:
    parts: list[bytes] = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while part := stream.read1():
                parts.append(part)
    except (EOFError, OSError, zlib.error) as error:
        # A wrong checksum is noticed only at the end and may be due to any line.
        known = not isinstance(error, gzip.BadGzipFile)
        line = 1 + sum(part.count(b"\n") for part in parts) if known else None
        raise DataError(
            path, line,
            f"expected an intact gzip file, got one cut off or corrupt ({error}); fetch it again",
        ) from None  # fmt: skip
    return b"".join(parts)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most like the given one.

    Example:
        >>> nearest("NOUM", ["VERB", "NOUN"])
        'NOUN'
    """
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
