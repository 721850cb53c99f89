"""The one error that everything about checkpoints raises."""


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read, trusted or fitted; the message says which and what to do."""
