"""Files that are written whole or not at all."""
import contextlib
import os
import pathlib

from utils.errors import UserError


@contextlib.contextmanager
def atomic_write(path):
    """Within, a path beside `path` to write a file to; at the end it takes the place of `path`.

    After a crash at any moment the old file is there or the new one, and after an error the old
    one. Raises UserError where the disk is full or cannot be written.
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
        raise UserError(f"{path}: could not be written ({error.strerror}); what was saved before "
                        f"is untouched. Make room; a training goes on with --resume") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder):
    """Make the rename itself durable; not every system lets a folder be synced."""
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
