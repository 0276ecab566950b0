"""Read text files as people's programs write them, and write files whole or not at all.

read_text reads every text file of a user: UTF-8 with or without a byte-order mark, UTF-16 with one,
and any line ends. split_numbers splits a line of numbers, read_table a table of rows.

Every result (checkpoint, table, ONNX file, model card) goes through atomic_write: it is written
beside its target, flushed to disk and renamed, so that a reader or a crash never meets half a file.

OutputFile does the same for a file that a user names and that may be a link, a device or a pipe.
"""
from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from utils.errors import DiskError, UserError

# Byte-order marks; Excel and PowerShell write them.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
          (codecs.BOM_UTF16_BE, "utf-16"))
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+(e[+-]?\d+)?\s*", re.IGNORECASE)


def _decode(path, errors):
    content = pathlib.Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    return content.decode(encoding, errors)


def read_text(path: pathlib.Path | str, errors: str = "strict") -> str:
    r"""Read a text file, without its byte-order mark and with \n as the only line end.

    Args:
        path: a file in UTF-8, or in UTF-16 with a byte-order mark.
        errors: what to do with bytes that are no text, as for bytes.decode.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8; a ValueError.
    """
    return _decode(path, errors).replace("\r\n", "\n").replace("\r", "\n")


def is_number(text: str) -> bool:
    """Return True if float() reads the text: nan and inf count."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def split_numbers(line: str, is_last: Callable[[str], bool] = is_number) -> list[str]:
    """Split a line that ends in numbers, by tab, semicolon, comma or blanks.

    The separator is the first of these at which the line's last field is a number, because a name
    before the numbers may hold any of them. Decimal commas become points, except where a comma
    separates the fields.

    Args:
        line: such as `a.jpg 1.5 2`, `a.jpg;1,5;2` or `1.5, 2`.
        is_last: whether a text may be the last field.
    """
    for separator in "\t;,":
        fields = [field.strip() for field in line.split(separator)]
        if separator == "," and any(map(_are_numbers, fields)):
            continue  # Blanks separate numbers with decimal commas.
        fields = fields if separator == "," else _decimal_points(fields)
        if len(fields) > 1 and is_last(fields[-1]):
            return fields
    return line.split()


def _are_numbers(field):
    words = field.split()
    return len(words) > 1 and all(map(is_number, words))


def _decimal_points(fields):
    return [field.replace(",", ".") if _DECIMAL_COMMA.fullmatch(field) else field
            for field in fields]


def delimiter_of(line: str) -> str:
    """Return what separates the columns of a table: comma, semicolon, tab, or else a blank."""
    found = max(",;\t", key=line.count)
    return found if found in line else " "


class Table(NamedTuple):
    """A table of a text file.

    Attributes:
        columns: the names in its first line.
        rows: number of the line from 1, and column to text, of each row that is not blank; a
            missing field is None.
    """
    columns: list[str]
    rows: list[tuple[int, dict[str, str | None]]]


def read_table(path: pathlib.Path | str, errors: str = "strict") -> Table:
    """Read a table with a header, whose columns a comma, semicolon, tab or blank separates.

    Raises:
        OSError, UnicodeDecodeError: as read_text.
        csv.Error: it is no table.
    """
    text = _decode(path, errors)
    delimiter = delimiter_of(text.partition("\n")[0])
    if delimiter == " ":
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        columns = lines[0][1].split() if lines else []
        # The first column may be a path with blanks.
        rows = [(n, line.rsplit(None, max(len(columns) - 1, 0))) for n, line in lines[1:]]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, fields) for fields in reader if any(map(str.strip, fields))]
    if delimiter != ",":
        rows = [(number, _decimal_points(fields)) for number, fields in rows]
    # As in csv.DictReader, further fields are left out and missing ones are None.
    return Table(columns, [(number, dict(zip(columns, fields + [None] * len(columns))))
                           for number, fields in rows])


def refuse_lfs_pointer(path: pathlib.Path) -> None:
    """Raise UserError for the text file that Git LFS leaves in place of a large file."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: is a pointer of Git LFS; `git lfs pull` fetches the file "
                            f"itself")


@contextlib.contextmanager
def atomic_write(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Replace a file by one that is written completely, or leave it unchanged.

    The context gives a temporary path in the same folder to write to; on exit the file there
    replaces `path`. After a crash at any moment `path` holds the old file or the new one, after an
    error the old one.

    Raises:
        DiskError: where the disk is full or cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if not path.parent.is_dir():
            raise DiskError(f"{path}: could not be written: its folder is not there; if it was "
                            f"moved or deleted, put it back") from None
        raise DiskError(f"{path}: could not be written ({error.strerror}); earlier files are "
                        f"untouched; free space or correct the permissions") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path | str, text: str) -> None:
    """Write UTF-8 text with atomic_write."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class OutputFile:
    """A file named by the user that becomes visible when it is complete.

    An existing file is replaced at once by `keep`, or left as it was by `drop`; until then the
    content goes to a temporary file. A new file, a device and a pipe are written directly. Links
    and file modes are preserved.

    Args:
        path: the file. Its folder is made.
        flag: the flag that names the file, for error messages.

    Attributes:
        part: the path to write to.

    Raises:
        UserError: where the folder or the temporary file cannot be made.
    """

    def __init__(self, path: pathlib.Path | str, flag: str | None = None):
        self.name = f"{flag} {path}" if flag else str(path)
        self.path = self.part = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self.path = self.path.resolve()
                handle, part = tempfile.mkstemp(self.part.suffix, ".part-", self.path.parent)
                os.close(handle)
                shutil.copymode(self.path, part)
                self.part = pathlib.Path(part)
        except OSError as error:
            raise self.error(error) from None

    def error(self, error: OSError, note: str = "") -> UserError:
        """Return the UserError for a file that cannot be written."""
        return UserError(f"{self.name}: cannot be written: {error.strerror or error}{note}")

    def write(self, content: bytes) -> None:
        """Write the whole content and keep it.

        Raises:
            UserError: where it cannot be written; an existing file is left as it was.
        """
        try:
            self.part.write_bytes(content)
            self.keep()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.drop()
            raise self.error(error) from None

    def keep(self) -> None:
        """Put what was written in the file's place."""
        if self.part != self.path:
            os.replace(self.part, self.path)

    def drop(self) -> None:
        """Remove what was written."""
        if self.part.is_file():
            self.part.unlink()


def _sync_folder(folder):
    """Make the rename itself durable; not every system allows a folder to be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
