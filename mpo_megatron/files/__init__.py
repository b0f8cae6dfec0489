"""File handling for other modules: writes that are complete or absent, digests, one writer at a time.

    atomic, partial   files and folders that appear only when complete; leftovers of killed processes
    lock              one writer at a time
    digests           checksums of files that the package writes, compared when read
    functions         functions in users' files

Needs no torch.
"""


class DataError(ValueError):
    """Unusable data; the message names the file or folder, what is wrong, and the fix."""
