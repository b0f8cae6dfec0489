"""The known formats, in the order in which they are tried; docs/extending.md explains how to add one."""

from __future__ import annotations

from mpo_megatron.data.format_groups import GROUPS, NECTAR, ULTRAFEEDBACK
from mpo_megatron.data.format_pairs import COMPARISON, PAIRS
from mpo_megatron.data.format_single import RATINGS, UNPAIRED

FORMATS = (ULTRAFEEDBACK, NECTAR, GROUPS, PAIRS, COMPARISON, UNPAIRED, RATINGS)
