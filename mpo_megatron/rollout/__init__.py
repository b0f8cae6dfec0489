"""Rounds on the policy's own samples: generate K responses, score them, select, repeat.

Every stage reads and writes *group lines* (`records.py`): one JSON object per prompt, in the format `groups` that `mpo prepare`
reads, with what the stage found out beside it.

generate.py    `mpo generate`: prompts.py reads and tokenizes, engines/ answer, draws.py draws again what is empty, repeated or
               unusable, thoughts.py puts back what a server took out
score.py       `mpo score`: scorers/ give the scores, score_summary.py says what looks wrong about them; client.py asks
               servers, for a judge and for an engine
select.py      `mpo select`: filters.py has the rules, spacing_plot.py draws the rewards
iterate.py     `mpo iterate`: prompt_split.py deals prompts to rounds, rounds.py plans and checks all stages, stages.py starts
               those that need a process, divergence.py measures KL, round_report.py says what a round did
live/          samples of the policy while it trains

Shared: records.py (lines and summaries on disk), shards.py, models.py (checkpoints), progress.py, panels.py (pictures).
"""
