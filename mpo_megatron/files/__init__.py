"""Files for other modules: complete or absent, checked by digests, one writer at a time.

    atomic, partial   files and folders that appear complete; leftovers of killed processes
    lock              one writer at a time
    digests           checksums of what the package writes, compared when it is read
    functions         functions in users' files

All of it works without torch.
"""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder, what is wrong, and the fix."""
