"""Facts from the small files of a checkpoint, and what follows from them: computational cost, and valid layouts.

Needs no Megatron-Core, whose import takes seconds.
"""
