"""Groups: from common data formats, to token ids on disk, to packed rows.

    sources, readers, spill      files, folders and datasets → rows → groups; facts about all rows, on disk
    formats, known_formats       what a format is; the known formats, which are in
    format_groups, _pairs, _single, _parts  all responses, two, or one in a row; what they share
    field_record, fields         a row that records which fields are read; its values, checked
    conversations                prompts, messages, tools; where answers begin
    tokenizer, tokenizer_backends  the interface of a tokenizer, and how it is loaded; the two kinds of tokenizers
    chat, drawn                  text → token ids, through the chat template, or as sampled
    turns, thoughts              answers of several turns; thoughts opened by a prompt
    prepare, choice              `mpo prepare`: its two passes; the choice of held-out groups
    tokenizing, chunks, workers  chunks of rows → chunks of groups, in worker processes
    fidelity, preview            a group compared with `apply_chat_template`; a group as the model sees it
    finishing, rewards, summary  options that change single groups, and rewards; the printed summary
    group, store, store_writing  a group; prepared groups on disk, read and written
    packing, loader              groups → packed rows; a step's rows, built ahead
    outcomes                     a policy's log-probs of held-out groups, on disk

Importing it needs neither Megatron nor a GPU.
"""
