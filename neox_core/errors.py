"""The exceptions that users meet. Each message says what happened, with which values, and what to do."""


class LlemmaError(Exception):
    """Base class: the command line shows the message alone, without a traceback."""


class ConfigError(LlemmaError):
    """A configuration that cannot be run."""


class DataError(LlemmaError):
    """Input text, token files or a mixture that cannot be used."""


class CheckpointError(LlemmaError):
    """Weights or training state that are missing, damaged, or not what was promised."""


class StorageError(LlemmaError):
    """The object store cannot be reached or refuses a request."""


class LaunchError(LlemmaError):
    """A job that cannot be submitted, or that ended without a result."""


class TrainingError(LlemmaError):
    """Training stopped because going on would spoil the model."""


class StoppedError(LlemmaError):
    """Training was told to stop before its last step and has saved its state: run again to go on."""


SUPERSEDED_EXIT_CODE = 77
"""EX_NOPERM of sysexits.h: another job of this training is at work, and this one ended in the middle of a step."""
GO_ON_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the job ended too early, and the same command goes on from what is saved."""
