"""Training: one step, the loop around it, checkpoints, reference log-probs and metrics.

    loop                                         a run from top to bottom: begin here
    launcher, rank, __main__, reference_main     torchrun; a rank of any command, of `mpo train`, of `mpo reference`
    setup, inputs                                what a run reads, opened, decided and checked, before any rank works
    session, run                                 a rank's part of the models; what a training run works with
    objective, step, schedule, resident, term    the loss; rows through the policy, and a reference beside it; what may be added
    optimizer                                    AdamW and its learning rate
    reference                                    log-probs of the reference, computed once and kept
    evaluation, metrics, throughput, tracking/   held-out groups; how the policy does, and how fast; where it is written down
    checkpoints/                                 weights and states to and from disk; where a run resumes
    faults/                                      what is watched; steps that look wrong; requests to stop

What all ranks must call together says so.
"""
