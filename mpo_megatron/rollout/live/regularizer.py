"""SPO's regulariser as a term of a training run: every T steps, samples of the current policy, used for the next T steps.

    <run>/online/samples_00000008.jsonl    the samples drawn after 8 steps, token ids included

The file is written before any step uses it. A run that resumes reads it again, since the weights that drew it are gone, and so
continues with the same samples; only a batch that is due at the very step of the checkpoint is drawn anew, from the same weights.
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
"""Batches of samples draw from seeds this far apart."""
LARGEST_ENGINE_KL = 1.0
"""Nats a token; rounding to bfloat16 makes thousandths, quantised weights hundredths, other weights several."""


class SampleRegularizer:
    """β · KL(π ‖ π_ref) on recent samples of the policy (a `GradientTerm`).

    Metrics: `sample_kl`, the divergence of a sample in nats, summed over its tokens, mean over samples; `sample_length`, its mean
    number of tokens; at a step that samples `sample_seconds`, what gathering weights and sampling took, and `engine_kl`, an
    estimate of KL(engine ‖ policy) on the samples in nats per token: what rounding or a quantised engine changes.
    """

    def __init__(self, run: Run, sampler: LivePolicy, resident: Resident) -> None:
        self.run, self.sampler, self.resident = run, sampler, resident
        self.online = run.config.online
        self.drawn_at = -1
        self.samples: list[TokenizedGroup] = []
        self.engine_logps: list[float | None] = []
        """Of the samples under the weights of the engine that drew them, where it said them."""

    def resume(self, done: int) -> None:
        """Delete samples of steps that the run will take again: their weights are not those it will have."""
        if self.run.ranks.is_main:
            for path in self.folder.glob("samples_*.jsonl"):
                if int(path.stem.removeprefix("samples_")) > done or done == 0:
                    path.unlink()
        barrier()

    def add(self, step: int) -> dict[str, float]:
        """Sample if it is time to, and add the regulariser's gradients at this step."""
        run, started = self.run, time.perf_counter()
        due = max(step - step % self.online.every, run.config.data.first_step)  # new groups, new samples
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
            **(self._engine_kl(logps.response, table) if refreshed and due == step else {}),  # the policy that was handed over
        }

    def _engine_kl(self, policy: Tensor, table: GroupTable) -> dict[str, float]:
        """KL(engine ‖ policy) per token, as the mean of log q(y) − log π(y) over samples y of the engine's q."""
        if any(logp is None for logp in self.engine_logps):
            return {}
        engine = torch.tensor(self.engine_logps, dtype=torch.float64)
        divergence = float(engine.sum() - policy[table.valid].double().sum().cpu()) / int(table.lengths.sum())
        if not divergence <= LARGEST_ENGINE_KL:
            raise DataError(
                f"online.engine: its samples are {divergence:.2f} nats a token from the policy (engine_kl), so that it has other "
                "weights, or computes something else with them; look at its log for weights that were not loaded, or set "
                "online.engine = transformers."
            )
        return {"engine_kl": divergence}

    @property
    def folder(self) -> Path:
        """Where samples are kept."""
        return self.run.folder / "online"

    def samples_of(self, due: int, step: int) -> list[TokenizedGroup]:
        """The samples drawn after `due` steps: read if they are on disk, else drawn from the policy; the same on every rank."""
        path = self.folder / f"samples_{due:08d}.jsonl"
        records: list[list[Record] | None] = [None]
        if self.run.ranks.is_main and path.is_file():
            records = [unseal_lines(path, f"remove it: step {step + 1} then uses samples of the current policy")]
        if get_world_size() > 1:  # other nodes may not see the main process's disk
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
        """Samples of the current policy, for prompts of the last T steps, as group lines with token ids; on every rank."""
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
            prompts.append(Prompt(group_id=f"{index} {group.group_id}", token_ids=tokens, messages=()))  # ids may repeat
        generations = self.sampler.sample(prompts, sampling)
        left = self.online.num_samples
        records = []
        for index, generation in zip(indices.tolist(), generations, strict=True):
            records.append(as_record(index, data, generation, left))
            left -= len(records[-1]["responses"])
        return [record for record in records if record["responses"]]

    def tokenized(self, record: Record) -> TokenizedGroup:
        """A kept line as rows are built from it."""
        prompt = self.run.setup.train[record["index"]]
        return TokenizedGroup(
            group_id=record["group_id"],
            prompt_tokens=prompt.prompt_tokens,
            response_tokens=tuple(np.array(response["tokens"], np.int32) for response in record["responses"]),
        )


def as_record(index: int, data: PreparedGroups, generation: Generation, limit: int) -> Record:
    """A group line of at most `limit` samples; with the group's place in the data, and token ids."""
    responses = []
    for response in generation.responses[:limit]:
        line = response.as_line() | {"tokens": list(response.token_ids)}
        line.pop("token_ids", None)  # `tokens` are there for every response, also one that a stop text cut
        responses.append(line)
    group = data[index]
    return {"group_id": group.group_id, "index": index, "prompt": group.prompt_text, "responses": responses}


def choose_prompts(data: PreparedGroups, config: TrainConfig, due: int) -> tuple[Int64, int]:
    """Which groups' prompts are sampled after `due` steps, and how many samples each gets.

    Prompts of the last T steps ("recently observed", SPO Algorithm 1), of the coming step at the run's start; without repetition,
    with several samples each where there are fewer prompts than samples.
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
    """The regulariser of a run, with the engine that samples and the reference model loaded.

    Raises:
        ConfigError: samples would not fit a row, or the engine is not installed.
    """
    config, data = run.config, run.setup.train
    longest = data.info.max_prompt_tokens + config.online.max_tokens - 1
    require(
        longest <= config.data.row_tokens,
        f"online.max_tokens = {config.online.max_tokens}: with the longest prompt of {data.path} a sample takes {longest} "
        f"tokens, data.row_tokens = {config.data.row_tokens}; raise data.row_tokens, or lower online.max_tokens.",
    )
    sampler = LivePolicy(run.setup, run.ranks, run.model)
    resident = run.resident or reference_model(run.session, run.model)
    return SampleRegularizer(run, sampler, resident)
