"""Errors that a user can act on. Each message is one line: what, where, got, expected, what to do.

    DiffusionError            the command line prints it and exits with 2
    ├── InputError            what the caller asked for or gave cannot be used
    ├── CheckpointError       the source checkpoint is missing, damaged or of an unknown kind
    ├── PackageError          a package, compiled model, bundle or zip is damaged or not what it claims to be
    ├── UnsupportedError      a well-formed program uses something that is not covered, named in the message
    ├── VerificationError     a converted model does not compute what its source computes
    ├── StorageError          a disk is full, read-only or must not be written to, or another process writes there
    ├── HubError              the Hugging Face Hub, or the way to it, failed: another try may do
    └── InstallationError     the installation lacks something, with how to get it

Anything else that escapes is a bug in coreml-sd and keeps its traceback.
"""


class DiffusionError(Exception):
    """Base of every error with a message for the user."""


class InputError(DiffusionError):
    """An argument, option, prompt, picture or array that cannot be used."""


class CheckpointError(DiffusionError):
    """A source checkpoint that is missing, damaged or of an unknown kind."""


class PackageError(DiffusionError):
    """A package, compiled model, bundle or zip that is damaged or not what it claims to be."""


class UnsupportedError(DiffusionError):
    """A well-formed program that uses something that is not covered."""


class VerificationError(DiffusionError):
    """A converted model that does not compute what its source computes."""


class StorageError(DiffusionError):
    """A place that cannot be written to now: the disk is full or read-only, permission is missing, or another
    process is writing there. Once that is mended, the same call goes on."""


class HubError(DiffusionError):
    """A failure of the Hugging Face Hub or of the connection to it: the same call may succeed later."""


class InstallationError(DiffusionError):
    """An installation that lacks something."""


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
