"""Training: one step, the loop around it, checkpoints, reference log-probs and metrics.

    loop                                         a run from top to bottom: start reading here
    launcher, rank, __main__, reference_main     torchrun; a rank of any command, of `mpo train`, of `mpo reference`
    setup, inputs                                a run's inputs, opened and checked before any rank works
    session, run                                 a rank's part of the models; everything a training run works with
    objective, step, schedule, resident, term    the loss; rows through the policy, and a reference beside it; additional terms
    optimizer                                    AdamW and its learning rate
    reference                                    log-probs of the reference, computed once and cached
    evaluation, metrics, throughput, tracking/   held-out groups; quality and speed of the policy; where they are recorded
    checkpoints/                                 weights and states to and from disk; where a run resumes
    faults/                                      watchdogs; suspicious steps; requests to stop

Functions that all ranks must call together say so.
"""
