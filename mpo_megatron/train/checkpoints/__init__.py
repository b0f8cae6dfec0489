"""Checkpoints of a run.

    checkpoint                     weights and optimizer states to and from Megatron's distributed checkpoints
    saving                         when and how they are written
    step_folders, verification     what a checkpoint's folder holds, and which are complete; whether one is whole to the byte
    course, resumption             what a run's course depends on; where it resumes, and whether it may

What all ranks must call together says so.
"""
