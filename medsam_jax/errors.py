"""The error that a user can act on."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Bad input or configuration: one line that names file or field, the value and the remedy."""

    def __str__(self) -> str:
        """Returns the message; what a damaged file put into it is escaped if it cannot be shown."""
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


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


def check_name(path: str | os.PathLike) -> None:
    """Checks that libraries in C++, which take UTF-8, can be given a path.

    Raises:
      UserError: a name that is not UTF-8, or one outside ASCII where Python reads names in another
        encoding (the C locale), in which SimpleITK aborts.
    """
    name = os.fspath(path)
    encoding = sys.getfilesystemencoding().replace("-", "").lower()
    if name.isascii() or (encoding == "utf8" and not re.search("[\ud800-\udfff]", name)):
        return
    shown = name.encode("ascii", "backslashreplace").decode()
    if encoding != "utf8":
        raise UserError(f"{shown}: names are read as {encoding} here; set PYTHONUTF8=1 for UTF-8")
    raise UserError(f"{shown}: the name is not UTF-8; rename it")
