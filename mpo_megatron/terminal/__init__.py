"""Between a command and the terminal that it runs in.

    visible, console   text of others, shown without obeying it
    output             output that nobody reads any more
    next_command       the command that comes after a finished one
    interruption       requests to stop a command that runs in one process

It imports nothing else of the package.
"""
