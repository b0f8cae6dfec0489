"""Files that others write and read: complete or not there, known to be whole, one writer at a time.

    atomic, partial   files and folders that appear complete; what a killed process left of them
    lock              one writer at a time
    digests           checksums of what the package writes, compared when it is read
    functions         functions of the user's, in files of theirs

All of it works without torch.
"""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder, what is wrong, and the fix."""
