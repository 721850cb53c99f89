"""The error that loading a checkpoint raises."""


class CheckpointError(ValueError):
    """A checkpoint cannot be found or read, is not safe to read, or does not fit the stage it is for.

    The message names the checkpoint or file and says what to do.
    """
