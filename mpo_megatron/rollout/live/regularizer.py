"""SPO's regulariser in a training run: every T steps, draw samples from the current policy, and use them for T steps.

    <run>/online/samples_00000008.jsonl    samples drawn after 8 steps, with token ids

The file is written before any step uses it. A resumed run reads it again, because the weights that drew it are gone, and so uses
the same samples. Only a batch due exactly at the checkpoint's step is redrawn, from the same weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed import barrier, broadcast_object_list, get_world_size

from mpo_megatron.config import TrainConfig, require
from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import GroupTable, step_indices
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import seal_lines, unseal_lines
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.live.policy import LivePolicy
from mpo_megatron.rollout.live.sample_kl import add_kl_gradients
from mpo_megatron.rollout.records import Record
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.run import Run, reference_model

SEED_STRIDE = 1_000_003
"""Distance between the seeds of successive batches of samples."""
LARGEST_ENGINE_KL = 1.0
"""Nats per token. Rounding to bfloat16 gives thousandths, quantised weights hundredths, wrong weights several nats."""


class SampleRegularizer:
    """β · KL(π ‖ π_ref) on recent samples of the policy (a `GradientTerm`).

    Metrics: `sample_kl`, a sample's divergence in nats, summed over its tokens, mean over samples; `sample_length`, mean tokens.
    At a step that samples: `sample_seconds`, the time for gathering weights and sampling, and `engine_kl`, an estimate of
    KL(engine ‖ policy) on the samples in nats per token, which shows the effect of rounding or of a quantised engine.
    """

    def __init__(self, run: Run, sampler: LivePolicy, resident: Resident) -> None:
        self.run, self.sampler, self.resident = run, sampler, resident
        self.online = run.config.online
        self.drawn_at = -1
        self.samples: list[TokenizedGroup] = []
        self.engine_logps: list[float | None] = []
        """Log-probs of the samples under the weights of the engine that drew them, where it reported them."""

    def resume(self, done: int) -> None:
        """Delete samples of steps that the run will repeat: other weights will be due then."""
        if self.run.ranks.is_main:
            for path in self.folder.glob("samples_*.jsonl"):
                if int(path.stem.removeprefix("samples_")) > done or done == 0:
                    path.unlink()
        barrier()

    def add(self, step: int) -> dict[str, float]:
        """Draw samples if due, and add the regulariser's gradients of this step."""
        run, started = self.run, time.perf_counter()
        due = max(step - step % self.online.every, run.config.data.first_step)  # new data needs new samples
        refreshed = due != self.drawn_at
        if refreshed:
            self.samples, self.drawn_at = self.samples_of(due, step), due
        seconds = time.perf_counter() - started
        logps, table = add_kl_gradients(run.model, self.samples, self.online.kl_weight, run.ranks, run.shape, self.resident)
        assert logps.kl is not None
        number = int(table.valid.sum())
        return {
            "sample_kl": float(logps.kl.sum()) / number,
            "sample_length": float(table.lengths.sum()) / number,
            **({"sample_seconds": seconds} if refreshed else {}),
            **(
                self._engine_kl(logps.response, table) if refreshed and due == step else {}
            ),  # only while the policy still is the one that sampled
        }

    def _engine_kl(self, policy: Tensor, table: GroupTable) -> dict[str, float]:
        """KL(engine ‖ policy) per token, as the mean of log q(y) − log π(y) over samples y of the engine's q."""
        if any(logp is None for logp in self.engine_logps):
            return {}
        engine = torch.tensor(self.engine_logps, dtype=torch.float64)
        divergence = float(engine.sum() - policy[table.valid].double().sum().cpu()) / int(table.lengths.sum())
        if not divergence <= LARGEST_ENGINE_KL:
            raise DataError(
                f"online.engine: its samples differ from the policy by {divergence:.2f} nats per token (engine_kl): it has other "
                "weights, or computes differently; check its log for weights that were not loaded, or set "
                "online.engine = transformers."
            )
        return {"engine_kl": divergence}

    @property
    def folder(self) -> Path:
        """Folder of the samples."""
        return self.run.folder / "online"

    def samples_of(self, due: int, step: int) -> list[TokenizedGroup]:
        """Samples drawn after `due` steps: read from disk if they exist, else drawn from the policy; the same on every rank."""
        path = self.folder / f"samples_{due:08d}.jsonl"
        records: list[list[Record] | None] = [None]
        if self.run.ranks.is_main and path.is_file():
            records = [unseal_lines(path, f"remove it: step {step + 1} then uses samples of the current policy")]
        if get_world_size() > 1:  # other nodes may not see rank 0's disk
            broadcast_object_list(records, src=0)
        found = records[0]
        if found is None:
            if due != step and self.run.ranks.is_main:
                print(f"{path}: missing; step {step + 1} uses samples of the current policy.", flush=True)
            found = self.draw(due)
            if self.run.ranks.is_main:
                replace_file(path, seal_lines(found))
        self.engine_logps = [response.get("engine_logp") for record in found for response in record["responses"]]
        return [self.tokenized(record) for record in found]

    def draw(self, due: int) -> list[Record]:
        """Samples from the current policy for prompts of the last T steps, as group lines with token ids; on every rank."""
        data, config = self.run.setup.train, self.run.config
        indices, per_prompt = choose_prompts(data, config, due)
        sampling = Sampling(
            num_responses=per_prompt,
            temperature=self.online.temperature,
            max_tokens=self.online.max_tokens,
            stop_token_ids=data.info.end_token_ids,
            seed=config.seed + SEED_STRIDE * (due + 1),
            logps=True,
        )
        prompts = []
        for index in indices.tolist():
            group = data[index]
            tokens = tuple(group.prompt_tokens.tolist())
            prompts.append(Prompt(group_id=f"{index} {group.group_id}", token_ids=tokens, messages=()))  # group ids may repeat
        generations = self.sampler.sample(prompts, sampling)
        left = self.online.num_samples
        records = []
        for index, generation in zip(indices.tolist(), generations, strict=True):
            records.append(as_record(index, data, generation, left))
            left -= len(records[-1]["responses"])
        return [record for record in records if record["responses"]]

    def tokenized(self, record: Record) -> TokenizedGroup:
        """A stored line as a tokenized group, from which rows are built."""
        prompt = self.run.setup.train[record["index"]]
        return TokenizedGroup(
            group_id=record["group_id"],
            prompt_tokens=prompt.prompt_tokens,
            response_tokens=tuple(np.array(response["tokens"], np.int32) for response in record["responses"]),
        )


def as_record(index: int, data: PreparedGroups, generation: Generation, limit: int) -> Record:
    """A group line of at most `limit` samples, with the group's index in the data, and token ids."""
    responses = []
    for response in generation.responses[:limit]:
        line = response.as_line() | {"tokens": list(response.token_ids)}
        line.pop("token_ids", None)  # `tokens` exists for every response, also for one that a stop text truncated
        responses.append(line)
    group = data[index]
    return {"group_id": group.group_id, "index": index, "prompt": group.prompt_text, "responses": responses}


def choose_prompts(data: PreparedGroups, config: TrainConfig, due: int) -> tuple[Int64, int]:
    """The groups whose prompts are sampled after `due` steps, and the number of samples for each.

    Takes prompts of the last T steps ("recently observed", SPO Algorithm 1); at the run's start, of the coming step. Prompts do
    not repeat; each gets several samples where there are fewer prompts than samples.
    """
    first, size = config.data.first_step, config.data.groups_per_step
    recent = range(max(first, due - config.online.every), due) or range(first, first + 1)
    parts = [step_indices(step - first, len(data), size, seed=config.seed, shuffle=config.data.shuffle) for step in recent]
    candidates = np.unique(np.concatenate(parts))
    per_prompt = -(-config.online.num_samples // len(candidates))
    number = -(-config.online.num_samples // per_prompt)
    chosen = np.random.default_rng((config.seed, 1, due)).permutation(candidates)[:number]
    return chosen, per_prompt


def build_regularizer(run: Run) -> SampleRegularizer:
    """The regulariser of a run, with the sampling engine and the reference model loaded.

    Raises:
        ConfigError: samples would not fit into a row, or the engine is not installed.
    """
    config, data = run.config, run.setup.train
    longest = data.info.max_prompt_tokens + config.online.max_tokens - 1
    require(
        longest <= config.data.row_tokens,
        f"online.max_tokens = {config.online.max_tokens}: with the longest prompt of {data.path}, a sample takes {longest} "
        f"tokens, but data.row_tokens = {config.data.row_tokens}; raise data.row_tokens, or lower online.max_tokens.",
    )
    sampler = LivePolicy(run.setup, run.ranks, run.model)
    resident = run.resident or reference_model(run.session, run.model)
    return SampleRegularizer(run, sampler, resident)
