"""Groups: from the formats people have, to token ids on disk, to packed rows.

    fields, formats, readers     a field of a row; a row → a group; files, folders and datasets → groups
    tokenizer, chat, drawn       text → token ids, by the chat template, or as they were drawn
    prepare, rewards, summary    `mpo prepare`: its two passes, what it may do to rewards, what it tells of the data
    group, store                 a group; prepared groups on disk
    packing, loader              groups → packed rows; a step's rows, built ahead
    outcomes                     what a policy makes of held-out groups, on disk
    atomic, lock                 files and folders that appear whole; one writer at a time

Importing it needs neither Megatron nor a GPU.
"""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder, what is wrong, and the fix."""
