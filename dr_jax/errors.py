"""The error model: only our own and our user's mistakes raise; the world's failures are values (`records.Failure`).

    DrJaxError
    ├── ConfigError       wrong before anything starts: names field, value, what is allowed, what to do
    ├── CheckpointError   missing, partial or of another model: names path and step
    ├── BatchError        a PackedBatch invariant broke: always our bug
    ├── Diverged          training no longer gives finite numbers
    └── RolloutHalted     too many episodes of a step failed for outside reasons to train on it

Entry points turn a `DrJaxError` into one line on stderr and exit code 2.
"""


class DrJaxError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(DrJaxError, ValueError):
    """A setting, file or argument the user can correct. One or two lines: what, got, allowed, what to do."""


class CheckpointError(DrJaxError):
    """A checkpoint that is missing, partial, or belongs to another model or run."""


class BatchError(DrJaxError, ValueError):
    """A `PackedBatch` that breaks its invariants."""


class Diverged(DrJaxError):
    """Several steps in a row had no finite loss or gradient."""


class RolloutHalted(DrJaxError):
    """The outside world failed too often during one step; nothing was trained on it."""
