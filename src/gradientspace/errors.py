"""Every error that GradientSpace raises on purpose.

    GradientSpaceError            anything below; exit code 1
    ├── LostRankError             another process of the same run has ended
    └── InputError                what the user gave is wrong; exit code 2
        ├── ConfigError           a config key, value or combination
        ├── DataError             a data file or one of its rows
        ├── ModelError            a model, tokenizer or adapter
        ├── RunFolderError        a run folder: missing, of another config, damaged, not writable
        └── UnsureError           a prompt that the router may not place, by the run's own choice

A message is one line and says the value, the limit and the fix. It often quotes what was given, and that may hold line
breaks, terminal escapes or a megabyte: such characters are spelt out, and the middle of a very long message is cut.
"""

from gradientspace.plain_text import one_line

_LONGEST = 900
"""Characters of a message; the fix stands at the end and is kept."""


def readable(message: str) -> str:
    """One line of at most about `_LONGEST` characters, whatever the message quotes."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 3 :]}"
    return one_line(message)


class GradientSpaceError(Exception):
    """Base of all our errors. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __str__(self) -> str:
        return readable(super().__str__())


class LostRankError(GradientSpaceError):
    """Another process of the same run has ended; started again, the run goes on from what is finished.

    `told`: a third process has said so already, and one line is enough.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class InputError(GradientSpaceError):
    """The user's input is wrong; nothing was half-written."""

    exit_code = 2


class ConfigError(InputError):
    """A config key is unknown, a value out of range, or two values do not go together."""


class DataError(InputError):
    """A data file cannot be read or a row is not usable; the message names the row (first row is 1)."""


class ModelError(InputError):
    """A model, tokenizer or adapter is missing, incomplete or of a kind we cannot handle exactly."""


class RunFolderError(InputError):
    """A run folder is missing, belongs to another config, is damaged, or cannot be written."""


class UnsureError(InputError):
    """The router's probability lies below its threshold, and its fallback is an error."""
