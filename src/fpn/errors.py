"""Everything fpn raises on purpose. Each message names the file, the item and the remedy."""


class FpnError(Exception):
    """Base of all errors that a user can cause and mend. The command line prints them without a traceback."""


class DataError(FpnError):
    """A data set, annotation file or image cannot be used."""


class ImageError(DataError):
    """One image cannot be read."""


class CheckpointError(FpnError):
    """A file is not a checkpoint, or its weights do not fit the model."""


class OptionError(FpnError):
    """An option has a value that cannot work."""


class TrainingError(FpnError):
    """Training cannot go on, for example because a loss is no longer finite."""
