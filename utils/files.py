"""Write files whole or not at all.

Every result (checkpoint, table, ONNX file, model card) goes through atomic_write: it is written
beside its target, flushed to disk and renamed, so that a reader or a crash never meets half a file.

OutputFile does the same for a file that a user names and that may be a link, a device or a pipe.
"""
from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from utils.errors import UserError


@contextlib.contextmanager
def atomic_write(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Replace a file by one that is written completely, or leave it unchanged.

    The context gives a temporary path in the same folder to write to; on exit the file there
    replaces `path`. After a crash at any moment `path` holds the old file or the new one, after an
    error the old one.

    Raises:
        UserError: where the disk is full or cannot be written.
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
        raise UserError(f"{path}: could not be written ({error.strerror}); earlier files are "
                        f"untouched. Free space or correct the permissions; a training goes on "
                        f"with --resume") from None
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
