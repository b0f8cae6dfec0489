"""Training: one step, the loop around it, checkpoints, reference log-probs and metrics.

    loop                                         a run from top to bottom: begin here
    launcher, __main__, reference_main, ending   torchrun; a rank of `mpo train`, of `mpo reference`; how a rank ends
    inputs, run                                  what a run reads, opened and checked; what it works with, loaded
    objective, step, schedule, resident, term    the loss; rows through the policy, and a reference beside it; what may be added
    optimizer                                    AdamW and its learning rate
    reference                                    log-probs of the reference, computed once and kept
    evaluation, metrics, throughput, tracking/   held-out groups; how the policy does, and how fast; where it is written down
    checkpoint, gathering, saving                weights and states to and from disk; when and how they are written
    step_folders, resumption                     which checkpoints are whole; where a run goes on
    faults, incidents, signals, agreement        what is watched; steps that look wrong; requests to stop; one rank for all

What all ranks must call together says so.
"""
