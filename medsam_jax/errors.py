"""The error that a user can act on."""

import contextlib
import errno
import os
from collections.abc import Iterator


class UserError(Exception):
    """Bad input or configuration: one line that names file or field, the value and the remedy."""


class FatalError(UserError):
    """The cause is not this image: no use in going on with the next."""


class OutputError(FatalError):
    """The output folder cannot be written."""


@contextlib.contextmanager
def disk_space(place: str | os.PathLike) -> Iterator[None]:
    """Turns a disk that is full while the block writes into a `UserError` that names `place`."""
    try:
        yield
    except Exception as error:  # ArrayRecord and TensorStore raise kinds of their own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left" not in str(error) and "quota exceeded" not in str(error):
            raise
        raise UserError(
            f"{place}: the disk is full; free some space and give the same command again"
        ) from None
