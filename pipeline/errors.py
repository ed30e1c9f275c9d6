"""What can go wrong in the pipeline, apart from the store (store.errors).

    PipelineError
    ├── ConfigError     a setting is unknown, of the wrong type or range, or contradicts another
    ├── CorpusError     the text cannot be read, or there is too little of it
    ├── ModelError      the language model cannot be loaded, or lacks what was asked of it
    ├── CaptureError    activations, gradients or losses are missing or not finite
    └── TrainError      an SAE cannot be trained or loaded (NaN loss, foreign store, damaged file)

Every message says what, where, expected and got, and which command to run next.
"""


class PipelineError(Exception):
    """Base of every error that the pipeline raises for its user."""


class ConfigError(PipelineError):
    """A setting is unknown, of the wrong type or out of range, or contradicts another."""


class CorpusError(PipelineError):
    """The text cannot be read, or there is too little of it."""


class ModelError(PipelineError):
    """The language model cannot be loaded, or lacks what was asked of it."""


class CaptureError(PipelineError):
    """Activations, gradients or losses are missing or not finite."""


class TrainError(PipelineError):
    """An SAE cannot be trained or loaded."""
