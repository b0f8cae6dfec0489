"""Between a command and its terminal.

    visible, console   foreign text, printed without its control characters
    output             output whose reader has gone
    next_command       the command to run after a finished one
    interruption       requests to stop a command that runs in one process

Imports nothing else from the package.
"""
