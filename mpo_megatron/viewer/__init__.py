"""`mpo inspect`: a group, or a packed row of a run, as the model sees it.

source.py      a prepared folder, or a run's step → the row and its groups
blocks.py      a row → prompts, responses and padding, token by token; and which tokens attend to which
terminal.py    colours on a terminal
page.py        an HTML file, and the attention mask as a picture
"""
