"""Rounds on the policy's own samples: generate K responses, score them, select, repeat.

Every stage reads and writes *group lines* (`records.py`): one JSON object per prompt, in the format `groups` that `mpo prepare`
reads, with what the stage found out beside it.
"""
