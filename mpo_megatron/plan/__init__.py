"""Predict a run before submission: memory of every rank, communication, time, and the best layouts.

    hardware    GPUs and their networks                 models      shapes of published models
    parameters  weights of each rank, exactly           rows        groups → packed rows, as the trainer packs them
    memory      bytes of each rank at its peak          kept        those that autograd keeps of a row
    step_time   seconds of a step, and where they go
    search      layouts that fit, fastest first         remedies    what would make a run fit
    figures     a plan as numbers                       tables      the same on the terminal
    plan        the command

docs/reference/planning.md has the formulas, their sources, and comparisons with measurements.
"""
