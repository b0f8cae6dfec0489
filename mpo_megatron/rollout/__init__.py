"""Rounds on the policy's own samples: generate K responses, score them, select, repeat.

Every stage reads and writes *group lines* (`records.py`): one JSON object per prompt, in the format `groups` that `mpo prepare`
reads. Each stage adds its results to the lines.

generate.py    `mpo generate`: prompts.py reads and tokenizes prompts; engines/ answer them; draws.py redraws empty, repeated or
               unusable responses; thoughts.py restores thoughts that a server removed; generate_summary.py counts
score.py       `mpo score`: scorers/ compute the scores, score_summary.py warns about suspicious ones; client.py sends requests
               to servers, for a judge and for an engine
select.py      `mpo select`: filters.py has the rules, spacing_plot.py draws the rewards
iterate.py     `mpo iterate`: prompt_split.py assigns prompts to rounds, rounds.py plans and checks all stages, stages.py starts
               stages that need a process, divergence.py measures KL, round_report.py reports each round
live/          samples from the policy while it trains

Shared: records.py (lines and summaries on disk), shards.py, models.py (checkpoints), progress.py, panels.py (pictures).
"""
