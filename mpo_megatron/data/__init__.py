"""Groups: from the formats people have, to token ids on disk, to packed rows.

    sources, readers, spill      files, folders and datasets → rows → groups; what must be remembered of all rows, on disk
    formats, known_formats       what a format is; the formats people have
    field_record, fields         a row that notes what is read of it; its values, checked
    conversations                prompts, messages, tools; where answers begin
    tokenizer, chat, drawn       text → token ids, by the chat template, or as they were drawn
    turns, thoughts              answers of several turns; thoughts that a prompt opens
    prepare, tokenizing, choice  `mpo prepare`: its two passes; chunks in worker processes; which groups are held out
    fidelity, preview            a group against `apply_chat_template`; a group as the model sees it
    rewards, summary             what may be done to rewards; what is told of the data
    group, store                 a group; prepared groups on disk
    packing, loader              groups → packed rows; a step's rows, built ahead
    outcomes                     what a policy makes of held-out groups, on disk

Importing it needs neither Megatron nor a GPU.
"""
