"""The error that a user can act on."""


class UserError(Exception):
    """Bad input or configuration: one line that names file or field, the value and the remedy."""


class FatalError(UserError):
    """The cause is not this image: no use in going on with the next."""


class OutputError(FatalError):
    """The output folder cannot be written."""
