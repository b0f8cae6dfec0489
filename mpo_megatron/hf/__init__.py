"""What the small files of a checkpoint say of its model, and what follows from it: what it takes to compute, how it can be cut.

Needs no Megatron-Core, whose import takes seconds.
"""
