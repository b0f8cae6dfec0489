"""The report of a round: win rates, lengths, divergence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.files.digests import unseal
from mpo_megatron.rollout.divergence import summarize
from mpo_megatron.rollout.round_report import compute_win_rate, format_report, summarize_answers, write_report


def answers(**rewards: list[float | None]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"reward": reward, "num_tokens": 4, "finish_reason": "stop"} for reward in values]
        for name, values in rewards.items()
    }


def test_win_rate_by_hand() -> None:
    new, old = answers(a=[1.0, 2.0], b=[0.0, 0.0], c=[None, 5.0], d=[None]), answers(a=[1.0, 0.0], b=[1.0], c=[4.0], d=[1.0])
    result = compute_win_rate(new, old)
    # a: one tie and three wins of four, 7/8; b: 0; c: 1; d has no reward.
    assert result["value"] == pytest.approx((7 / 8 + 0 + 1) / 3)
    assert result["error"] == pytest.approx(np.std([7 / 8, 0, 1], ddof=1) / math.sqrt(3))
    assert result["ties"] == pytest.approx(1 / (4 + 2 + 1))
    assert result["prompts"] == 3


def test_rewards_and_lengths_by_hand() -> None:
    group = answers(a=[1.0, 0.0], b=[1.0, None])
    group["a"][0] |= {"num_tokens": 8, "finish_reason": "length"}
    summary = summarize_answers(group)
    assert summary["reward"] == pytest.approx(0.75)
    assert summary["error"] == pytest.approx(np.std([0.5, 1.0], ddof=1) / math.sqrt(2))
    assert (summary["tokens"], summary["truncated"], summary["without_reward"]) == (5.0, 0.25, 1)


def test_divergence_is_a_mean_over_prompts() -> None:
    policy, reference = np.array([-1.0, -2.0, -3.0]), np.array([-2.0, -4.0, -3.5])
    result = summarize(policy, reference, np.array([0, 2, 3]), np.array([2, 3, 2]))
    # Ratios 1, 2 | ½: prompts 1½ and ½.
    assert result["kl"] == pytest.approx(1.0)
    assert result["kl_error"] == pytest.approx(0.5)
    assert result["kl_per_token"] == pytest.approx(3.5 / 7)


def test_combined_report(tmp_path: Path) -> None:
    def policy(reward: float) -> dict[str, Any]:
        return {"reward": reward, "error": 0.01, "prompts": 9, "without_reward": 0, "tokens": 4.0, "truncated": 0.0}

    reports = [
        {
            "round": number,
            "before": policy(0.1 * number),
            "after": policy(0.1 * number + 0.1),
            "win_rate": {"value": 0.6, "error": 0.02, "ties": 0.1, "prompts": 9},
            "kl": None if number == 1 else {"kl": 0.5, "kl_error": 0.1},
            "selected": {"groups_read": 10, "groups_written": 8},
            "training": {"loss": "mpo", "params": {"beta": 0.1}, "lr": 1e-3},
        }
        for number in (1, 2)
    ]
    write_report(tmp_path, reports)
    assert unseal(tmp_path / "report.json") == {"rounds": reports}
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| start | 0.1 ± 0.01 |  |  | 4.0 | 0.0% |  |  |  |" in lines
    row = "| round 2 | 0.3 ± 0.01 | 60.0% ± 2.0% (10% tied) | 0.5 ± 0.1 | 4.0 | 0.0% | `mpo` (beta = 0.1) | 0.001 | 8 of 10 |"
    assert row in lines
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert format_report(reports[:1]).count("| round") == 1
