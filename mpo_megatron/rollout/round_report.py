"""The result of a round, from its folders: sampled reward before and after, wins against the previous policy, length, KL.

Everything is measured on the held-out prompts, answered by every policy. Standard errors are over prompts, which are
independent; the answers to one prompt count together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.config import TrainConfig
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import DamagedError, unseal_line
from mpo_megatron.rollout.panels import BLUE, GREEN, ORANGE, RED, draw_panels
from mpo_megatron.rollout.records import SCORED_FILE, SELECT_FILE, Record, is_reward, read_lines, read_summary, write_summary

REPORT_FILE = "report.json"


def report_round(
    number: int, folder: Path, before: Path, after: Path, kl: dict[str, Any] | None, train: TrainConfig
) -> dict[str, Any]:
    """The report of one round.

    Args:
        folder: the round's folder
        before: folder of the policy at the round's start
        after: folder of the policy at the round's end
        kl: KL(π ‖ π_ref) on the new policy's answers, if measured
    """
    old, new = read_answers(before), read_answers(after)
    selected = read_summary(folder / "selected" / SELECT_FILE)
    return {
        "round": number,
        "before": summarize_answers(old),
        "after": summarize_answers(new),
        "win_rate": compute_win_rate(new, old),
        "kl": kl,
        "selected": {name: selected[name] for name in ("groups_read", "groups_written", "responses_read", "responses_written")},
        "training_reward": selected["reward"]["mean"],
        "training": {
            "loss": train.loss.title,
            "params": train.loss.params,
            "lr": train.optimizer.lr,
            "last_step": read_last_metrics(Path(train.output) / "metrics.jsonl", train.stop_after),
        },
    }


def read_answers(policy: Path) -> dict[str, list[Record]]:
    """The scored answers of a policy to the held-out prompts, by prompt."""
    return {record["group_id"]: record["responses"] for record in read_lines(policy / "scored" / SCORED_FILE)}


def rewards_of(responses: Sequence[Record]) -> list[float]:
    """The rewards of responses that have one."""
    return [float(response["reward"]) for response in responses if is_reward(response.get("reward"))]


def summarize_answers(answers: dict[str, list[Record]]) -> dict[str, Any]:
    """Mean reward with its standard error over prompts, tokens per answer, share truncated at the token limit."""
    by_prompt = np.array([np.mean(rewards) for responses in answers.values() if (rewards := rewards_of(responses))])
    responses = [response for group in answers.values() for response in group]
    return {
        "reward": float(by_prompt.mean()) if len(by_prompt) else float("nan"),
        "error": standard_error(by_prompt),
        "prompts": len(by_prompt),
        "without_reward": len(responses) - sum(len(rewards_of(group)) for group in answers.values()),
        "tokens": float(np.mean([response["num_tokens"] for response in responses])),
        "truncated": float(np.mean([response["finish_reason"] == "length" for response in responses])),
    }


def compute_win_rate(new: dict[str, list[Record]], old: dict[str, list[Record]]) -> dict[str, Any]:
    """Share of pairs (new policy's answer, old policy's answer) to one prompt that the new one wins by reward.

    A tie counts as half a win. Prompts have equal weight, however many of their answers have a reward.
    """
    shares, ties, pairs = [], 0, 0
    for group_id, responses in new.items():
        ours, theirs = np.array(rewards_of(responses)), np.array(rewards_of(old.get(group_id, [])))
        if len(ours) and len(theirs):
            order = np.sign(ours[:, None] - theirs[None, :])
            shares.append(float((order.mean() + 1) / 2))
            ties += int((order == 0).sum())
            pairs += order.size
    values = np.array(shares)
    return {
        "value": float(values.mean()) if shares else float("nan"),
        "error": standard_error(values),
        "ties": ties / pairs if pairs else float("nan"),
        "prompts": len(shares),
    }


def standard_error(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Standard error of the mean of independent values; NaN with fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        DamagedError: a line differs from what was written.
        DataError: the file is gone.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} no longer exists; this run's report needs it: restore it, or use another output folder."
        ) from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                yield unseal_line(line)
            except ValueError as error:
                raise DamagedError(f"{path}:{number}: damaged or changed ({error}); remove the line.") from error


def read_last_metrics(path: Path, stop_after: int | None) -> dict[str, Any]:
    """Training metrics of the round's last step, on its batch: see `train/metrics.py`."""
    rows = list(read_metrics(path))
    steps = [row for row in rows if row.get("loss") is not None and (stop_after is None or row["step"] <= stop_after)]
    last = steps[-1] if steps else {}
    return {name: last[name] for name in ("step", "loss", "accuracy", "margin") if name in last}


# --------------------------------------------------------------------------------------------------- all rounds


def write_report(folder: Path, reports: Sequence[dict[str, Any]]) -> None:
    """Write report.json, report.md and report.png over all rounds."""
    write_summary(folder / REPORT_FILE, {"rounds": list(reports)})
    replace_file(folder / "report.md", [format_report(reports).encode()])
    plot_report(reports, folder / "report.png")


def format_report(reports: Sequence[dict[str, Any]]) -> str:
    """A table with one row per policy."""
    lines = [
        "# On-policy rounds",
        "",
        "Answers to held-out prompts; ± is one standard error over prompts. Wins are against the previous policy by the scorer's",
        "reward; a tie counts as half a win. KL is KL(π ‖ π_ref) in nats per answer.",
        "",
        "| policy | reward | wins | KL | tokens | cut off | loss | lr | groups trained on |",
        "|---|---|---|---|---|---|---|---|---|",
        _format_row("start", reports[0]["before"], None),
        *(_format_row(f"round {report['round']}", report["after"], report) for report in reports),
        "",
        "![Reward, wins, length and KL by round](report.png)",
        "",
    ]
    return "\n".join(lines)


def _format_row(name: str, answers: dict[str, Any], report: dict[str, Any] | None) -> str:
    wins = divergence = loss = lr = groups = ""
    if report is not None:
        rate, kl, training, selected = (report[key] for key in ("win_rate", "kl", "training", "selected"))
        wins = f"{rate['value']:.1%} ± {rate['error']:.1%} ({rate['ties']:.0%} tied)"
        divergence = f"{kl['kl']:.3g} ± {kl['kl_error']:.1g}" if kl else ""
        params = ", ".join(f"{key} = {value}" for key, value in training["params"].items())
        loss, lr = f"`{training['loss']}`" + (f" ({params})" if params else ""), f"{training['lr']:g}"
        groups = f"{selected['groups_written']:,} of {selected['groups_read']:,}"
    reward = f"{answers['reward']:.4g} ± {answers['error']:.2g}"
    cells = [name, reward, wins, divergence, f"{answers['tokens']:.1f}", f"{answers['truncated']:.1%}", loss, lr, groups]
    return f"| {' | '.join(cells)} |"


def plot_report(reports: Sequence[dict[str, Any]], picture: Path) -> None:
    """Reward, win rate, length, and KL where it was measured, by round, with standard errors."""
    measured = [report for report in reports if report["kl"]]
    answers = [reports[0]["before"], *(report["after"] for report in reports)]
    rounds = [report["round"] for report in reports]
    policies = [0, *rounds]
    style = {"fmt": "o-", "capsize": 3, "linewidth": 1.2, "markersize": 4}
    count = 4 if measured else 3
    with draw_panels(picture, count, width=3.75 * count, height=3.4) as panels:
        reward, wins, length = panels[:3]
        reward.errorbar(policies, [row["reward"] for row in answers], yerr=[row["error"] for row in answers], color=BLUE, **style)
        reward.set_title("sampled reward, held-out prompts", fontsize=10)
        rates = [report["win_rate"] for report in reports]
        wins.errorbar(rounds, [rate["value"] for rate in rates], yerr=[rate["error"] for rate in rates], color=GREEN, **style)
        wins.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
        wins.set_title("win rate against the previous policy", fontsize=10)
        length.plot(policies, [row["tokens"] for row in answers], "o-", color=ORANGE, markersize=4, linewidth=1.2)
        length.set_title("tokens per answer", fontsize=10)
        if measured:
            kl = panels[3]
            values, errors = ([report["kl"][name] for report in measured] for name in ("kl", "kl_error"))
            kl.errorbar([report["round"] for report in measured], values, yerr=errors, color=RED, **style)
            kl.set_title("KL(π ‖ π_ref) (nats per answer)", fontsize=10)
        for panel in panels:
            panel.set_xlabel("round")
            panel.set_xticks(policies)
