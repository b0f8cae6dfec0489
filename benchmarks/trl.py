"""Groups per second end to end: this trainer compared with TRL's DPOTrainer, on the same model and responses.

    python -m benchmarks.trl

Every group has K = 8 responses to a prompt four times as long. Both start from one Hugging Face checkpoint, in the same
precision, with AdamW and reference log-probs computed beforehand (their time is not counted on either side), and take turns
step by step in one process. Ours reads groups (loss `mpo`). DPO reads pairs, so TRL gets the groups as pairs, in two ways:

    best against each   7 pairs, 14 sequences: what DPO needs to learn from all 8 responses of a group
    disjoint pairs      4 pairs,  8 sequences: every response once, so both sides score the same number of responses

TRL's settings: precomputed reference, chunked log-probs (its own), no gradient checkpointing, no dropout, no truncation, and the
number of pairs per micro-batch that was fastest in a trial (--pairs). Its padding-free mode is disabled in this version; all
responses have one length here, so it pads nothing. Its data loading is not timed, ours is. Before timing, the two
implementations' reference log-probs are compared: they must agree.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks import timing
from benchmarks.setup import SHAPES, TrainStep, as_data, bench, hf_config, make_batch, make_groups, save_checkpoint
from mpo_megatron import device
from mpo_megatron.config import ConvertConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import iterate_steps
from mpo_megatron.model.convert import convert
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.objective import Logps
from mpo_megatron.train.step import forward_step

RESPONSES = 8
DATA = {"tiny": (1, 32, 8), "small": (2, 512, 128)}
"""Groups per step, prompt tokens, response tokens."""
GPU_DATA = (16, 1024, 256)
PAIRINGS = ("best against each", "disjoint pairs")
TOLERANCE = {"fp32": 1e-3, "bf16": 2.0}
"""Allowed difference of a response's log-prob between the implementations, in nats: sums of hundreds of rounded tokens."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare log-probs, then time both sides for each way of pairing."""
    parser = timing.build_parser(__doc__, list(SHAPES))
    parser.add_argument("--pairs", type=int, default=0, help="pairs per micro-batch of TRL; 0: try several, keep the fastest")
    options = timing.parse(parser, arguments)
    groups_per_step, prompt, response = DATA.get(options.size, GPU_DATA)
    config = hf_config(options.size)
    groups = make_groups(
        groups_per_step * (options.repeat + 1),
        prompt=prompt,
        response=response,
        responses=RESPONSES,
        vocab_size=config.vocab_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "hf", options.size)
        convert(ConvertConfig(input=f"{folder}/hf", output=f"{folder}/megatron"))
        rows = timing.measure_each(
            "trl",
            options,
            PAIRINGS,
            lambda pairing: measure(options, groups, groups_per_step, Path(folder), pairing, f"{prompt}:{response}"),
        )
    table = [
        {
            "TRL trains on": row["pairing"],
            "sequences per group, TRL": row["sequences"],
            "pairs per micro-batch": row["pairs_per_micro_batch"],
            "ours, groups/s": f"{row['ours_groups_per_second']:.3f}",
            "TRL, groups/s": f"{row['trl_groups_per_second']:.3f}",
            "ours / TRL": timing.shown(row["ratio"]),
            "largest difference of log π_ref, nats": f"{row['largest_difference']:.1e}",
        }
        for row in rows
    ]
    settings = {
        "groups_per_step": groups_per_step,
        "prompt": prompt,
        "response": response,
        "responses": RESPONSES,
        **SHAPES[options.size],
    }
    note = "Steps of both sides in turn, optimizer included; ratio: median (min…max) over turns."
    timing.report("trl", options, settings, rows, table, note)


def measure(
    options: argparse.Namespace,
    groups: list[TokenizedGroup],
    groups_per_step: int,
    folder: Path,
    pairing: str,
    ratio_of_lengths: str,
) -> timing.Row:
    """Both sides' seconds per step, for one kind of pairing."""
    pairs = {"best against each": RESPONSES - 1, "disjoint pairs": RESPONSES // 2}[pairing]
    per_step = pairs * groups_per_step
    choices = [options.pairs] if options.pairs else sorted({per_step, pairs, 2, 1} & divisors(per_step), reverse=True)
    trials = {}
    if len(choices) > 1:
        for size in choices:
            trial = build_trainer(folder, groups[: 2 * groups_per_step], pairing, size, per_step)
            trials[size] = min(run_in_turn(trial, lambda: None)[0])
    micro_batch = min(trials, key=lambda size: trials[size]) if trials else choices[0]
    trainer = build_trainer(folder, groups, pairing, micro_batch, per_step)
    with bench(options.size) as own:
        step = TrainStep(own)
        checkpoint.load_weights(step.model, folder / "megatron", own.ranks)
        shape = own.shape(8192)
        batch = make_batch(groups, step.objective, shape)
        with torch.no_grad():
            reference = forward_step(step.model, batch, step.objective, own.ranks)
        difference = compare_references(trainer, groups, pairing, reference)
        tolerance = TOLERANCE["bf16" if device.has_gpu() else "fp32"]
        if difference > tolerance:
            raise SystemExit(f"benchmarks.trl: the two sides' log-probs differ by {difference} nats: not the same computation")
        batches = our_batches(step, groups, groups_per_step, shape)

        def our_step() -> None:
            ours = next(batches)
            chosen = torch.from_numpy(ours.table.indices)
            step(ours, Logps(response=reference.response[chosen.to(reference.response.device)]))

        trl_seconds, our_seconds = run_in_turn(trainer, our_step)
    return {
        "pairing": pairing,
        "prompt:response": ratio_of_lengths,
        "sequences": 2 * pairs,
        "pairs_per_micro_batch": micro_batch,
        "trials": {str(size): seconds for size, seconds in trials.items()},
        "ours": timing.summarize(our_seconds),
        "trl": timing.summarize(trl_seconds),
        "ours_groups_per_second": groups_per_step / timing.summarize(our_seconds)["median"],
        "trl_groups_per_second": groups_per_step / timing.summarize(trl_seconds)["median"],
        "ratio": timing.compare(trl_seconds, our_seconds),
        "largest_difference": difference,
    }


def our_batches(step: TrainStep, groups: list[TokenizedGroup], groups_per_step: int, shape: Any) -> Iterator[Any]:
    """Steps from the trainer's own loader."""
    return iterate_steps(
        range(len(groups) // groups_per_step),
        as_data(groups),
        step.objective.select,
        shape,
        groups_per_step=groups_per_step,
        seed=0,
        shuffle=False,
    )


def divisors(number: int) -> set[int]:
    """The divisors of a number."""
    return {size for size in range(1, number + 1) if number % size == 0}


def pair_up(group: TokenizedGroup, pairing: str) -> list[tuple[int, int]]:
    """(chosen, rejected) of a group's pairs, the better response chosen."""
    assert group.rewards is not None
    order = [int(index) for index in np.argsort(-group.rewards)]
    if pairing == "best against each":
        return [(order[0], other) for other in order[1:]]
    return list(zip(order[::2], order[1::2], strict=True))


def build_trainer(folder: Path, groups: Sequence[TokenizedGroup], pairing: str, pairs: int, pairs_per_step: int) -> Any:
    """TRL's trainer on the groups' pairs, with its reference log-probs computed."""
    import datasets
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.has_gpu() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, local_files_only=True, attn_implementation="sdpa")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
    rows = []
    for group in groups:
        words = [" ".join(f"t{token}" for token in tokens) for tokens in group.response_tokens]
        prompt = " ".join(f"t{token}" for token in group.prompt_tokens) + " "
        rows += [{"prompt": prompt, "chosen": words[a], "rejected": words[b]} for a, b in pair_up(group, pairing)]
    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=pairs_per_step // pairs,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=pairs,
        gradient_checkpointing=False,
        max_length=None,
        num_train_epochs=1,
        learning_rate=1e-6,
        bf16=device.has_gpu(),
        use_cpu=not device.has_gpu(),
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=device.has_gpu(),
        train_sampling_strategy="sequential",
    )
    return DPOTrainer(model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)


def compare_references(trainer: Any, groups: Sequence[TokenizedGroup], pairing: str, ours: Logps) -> float:
    """Largest difference, in nats, between the two sides' log-probs of the same responses."""
    stored = trainer.train_dataset
    theirs = zip(stored["ref_chosen_logps"], stored["ref_rejected_logps"], strict=True)
    slots = [(slot, pair) for slot, group in enumerate(groups) for pair in pair_up(group, pairing)]
    return max(
        max(abs(chosen - float(ours.response[slot, a])), abs(rejected - float(ours.response[slot, b])))
        for (slot, (a, b)), (chosen, rejected) in zip(slots, theirs, strict=True)
    )


def run_in_turn(trainer: Any, our_step: Any) -> tuple[list[float], list[float]]:
    """Seconds of TRL's steps and of ours, alternating; the first of each is a warm-up and not counted."""
    from transformers import TrainerCallback

    theirs: list[float] = []
    ours: list[float] = []

    class Clock(TrainerCallback):
        """Times TRL's step from start to end, then runs one of ours."""

        def on_step_begin(self, *arguments: Any, **others: Any) -> None:
            self.started = timing.now()

        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            theirs.append(timing.now() - self.started)
            ours.append(timing.clock(our_step))

    trainer.add_callback(Clock())
    trainer.train()
    return theirs[1:], ours[1:]


if __name__ == "__main__":
    main()
