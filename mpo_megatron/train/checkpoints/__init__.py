"""Checkpoints of a run.

    checkpoint                     weights and optimizer states to and from Megatron's distributed checkpoints
    saving                         when and how checkpoints are written
    step_folders, verification     content of a checkpoint's folder, and which are complete; whether every byte is intact
    course, resumption             what a run's result depends on; where it resumes, and whether it may

Functions that all ranks must call together say so.
"""
