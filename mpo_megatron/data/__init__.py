"""Groups: from the formats people have, to token ids on disk, to packed rows."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder, what is wrong, and the fix."""
