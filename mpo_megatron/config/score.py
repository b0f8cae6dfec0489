"""Options of `mpo score`: one dataclass per kind of scorer, selected by `kind`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mpo_megatron.config.checks import ConfigError, check_function, check_writable, require
from mpo_megatron.config.generate import EndpointConfig, parse_shard, validate_endpoint
from mpo_megatron.config.options import Options
from mpo_megatron.config.parsing import from_dict
from mpo_megatron.config.values import Section, check_value, show


@dataclass(frozen=True, kw_only=True)
class ModelScorer(Section):
    """Common options of scorers that are Hugging Face models."""

    model: str
    """Checkpoint folder."""
    device: str = "auto"
    """`auto`: the first GPU (under torchrun, the rank's own), or the CPU; `balanced` spreads a model that is too large for one
    GPU over all GPUs, layer by layer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is the checkpoint's own, or float32 on a CPU without instructions for bfloat16."""
    batch_size: int = 16
    """Sequences scored in one batch."""
    max_length: int = 4096
    """Maximum tokens of a sequence; the model's own limit also applies."""
    too_long: Literal["error", "missing"] = "error"
    """A longer sequence is never truncated: it stops the command, which names it, or its score counts as missing."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint (ArmoRM); only for checkpoints you trust."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, f"batch_size = {self.batch_size}; it must be at least 1.")
        require(self.max_length >= 2, f"max_length = {self.max_length}; it must be at least 2.")


@dataclass(frozen=True, kw_only=True)
class RewardModelScorer(ModelScorer):
    """A sequence classifier with one logit (Skywork-Reward, GRM), or a model whose output is called `score` (ArmoRM)."""

    kind: ClassVar[str] = "reward_model"


@dataclass(frozen=True, kw_only=True)
class ServedRewardModelScorer(Section):
    """A reward model served by vLLM or SGLang."""

    kind: ClassVar[str] = "served_reward_model"
    endpoint: EndpointConfig
    """The server and the model's name on it; the endpoints are beside the `/v1` of `base_url`."""
    api: Literal["classify", "pooling", "score"] = "classify"
    """`classify` (vLLM, SGLang) and `pooling` (vLLM): the single output for the conversation; `score` (vLLM): a cross-encoder's
    output for prompt and response as two texts."""
    tokenizer: str = ""
    """Folder of the reward model's tokenizer with its chat template; not needed for `api: score`."""
    max_length: int = 4096
    """Maximum tokens of a sequence; the server's own limit also applies."""
    too_long: Literal["error", "missing"] = "error"
    """A longer sequence is never truncated: it stops the command, which names it, or its score counts as missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length >= 2, f"max_length = {self.max_length}; it must be at least 2.")
        require(
            bool(self.tokenizer) == (self.api != "score"),
            f"tokenizer = {self.tokenizer or None}, api = {self.api}; classify and pooling need the model's tokenizer, "
            "and score takes plain text.",
        )


@dataclass(frozen=True, kw_only=True)
class PairwiseScorer(ModelScorer):
    """A cross-encoder that estimates how likely response a beats response b (PairRM); the score is the share of comparisons
    won."""

    kind: ClassVar[str] = "pairwise"
    comparisons: Literal["all", "tournament"] = "all"
    """`all`: every pair, K(K−1)/2 of them; `tournament`: about K·log₂K, each response against others with similar wins."""
    both_orders: bool = True
    """Ask each pair in both orders and average, which removes position bias."""
    template: str = "<|source|>{prompt}<|candidate1|>{a}<|candidate2|>{b}"
    """Template that joins prompt and candidates into one text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("{prompt}", "{a}", "{b}"):
            require(self.template.count(name) == 1, f"template = {self.template}; it must contain {name} exactly once.")


@dataclass(frozen=True, kw_only=True)
class MatchScorer(Section):
    """1 if the answer extracted from a response equals the group's reference answer, else 0."""

    kind: ClassVar[str] = "match"
    field: str = "reference_answer"
    """Field of the group line with the answer (a list: any item counts); `meta.x` for a field under meta."""
    mode: Literal["exact", "numeric"] = "exact"
    """Compare as text without surrounding white space, or as numbers: 1,000 = 1e3 = 1000.0 = 2000/2."""
    extract: str | None = None
    """Regular expression whose last match in the response (its first group, if any) is the answer; by default the whole response
    (exact) or its last number (numeric)."""
    ignore_case: bool = False
    """For mode = exact: ignore upper and lower case."""
    tolerance: float = 1e-6
    """For mode = numeric: relative difference that still counts as equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pattern(self.extract, "extract")
        require(self.tolerance >= 0, f"tolerance = {self.tolerance}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class RegexScorer(Section):
    """`found` if a regular expression matches somewhere in the response, else `absent`."""

    kind: ClassVar[str] = "regex"
    pattern: str
    """The expression, in Python's syntax; flags such as `(?s)` are allowed inside it."""
    full: bool = False
    """Require a match of the whole response."""
    found: float = 1.0
    """Score if it matches."""
    absent: float = 0.0
    """Score if it does not match."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pattern(self.pattern, "pattern")


@dataclass(frozen=True, kw_only=True)
class FunctionScorer(Section):
    """Your Python function, called by the names of its parameters; None counts as missing.

    One response per call: `response` (or completion, solution_str), `prompt`, `messages`, `group`, and a group's field by its
    name. One group per call, returning K numbers: `responses` with `prompt`, `messages` or `group`. Many responses per call,
    every argument a list, as in TRL: `completions` (or responses, solution_strs) without these.
    """

    kind: ClassVar[str] = "function"
    function: str
    """`package.module:function` or `path/to/file.py:function`."""
    params: Options = field(default_factory=dict)
    """Keyword arguments for the function."""
    timeout: float = 60.0
    """Time limit of one call, in seconds; after that its scores are missing, and its process restarts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_function("function", self.function)
        require(0 < self.timeout < float("inf"), f"timeout = {self.timeout}; it must be a positive number of seconds.")


@dataclass(frozen=True, kw_only=True)
class JudgeScorer(Section):
    """A language model behind an endpoint that grades a response, or compares two."""

    kind: ClassVar[str] = "judge"
    endpoint: EndpointConfig
    """The server; `api` is always chat."""
    template: str
    """File with a Jinja template of the question to the judge; it can use prompt, messages, group, and response, or a and b."""
    mode: Literal["grade", "compare"] = "grade"
    """`grade`: one number per response; `compare`: the better of two, the score being the share of comparisons won."""
    parse: str | None = None
    """Regular expression whose last match's first group is the verdict: a number (grade), or A, B or tie (compare). By default,
    common forms are recognised: "Score: 7", "[[7]]", "Verdict: A", "[[A>>B]]", <verdict>A</verdict>, and JSON with such a key."""
    scale: list[float] = field(default_factory=list)
    """For mode = grade: lowest and highest grade; a number outside is no verdict."""
    structured: bool = False
    """Make the server enforce a JSON schema for the verdict, {"reason": …, "score": …} or {"reason": …, "winner": …}: vLLM,
    SGLang, llama.cpp and others support it; `transformers serve` ignores schemas and is refused."""
    comparisons: Literal["all", "tournament"] = "all"
    """For mode = compare: the pairs to ask, as for the kind pairwise."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    max_tokens: int = 1024
    """Maximum tokens of a verdict; a truncated one does not count."""
    garbage_retries: int = 2
    """Number of retries after an answer without a verdict; then the score is missing."""
    both_orders: bool = True
    """For mode = compare: ask each pair in both orders, which removes position bias."""
    contradictions: Literal["tie", "missing", "group_missing"] = "tie"
    """For both_orders: treatment of a pair whose orders disagree: a tie; not counted; or drop the scores of its group (SPO keeps
    a ranking only if both orders agree)."""
    prompt_price: float = 0.0
    """Price per million tokens that the judge reads; if set, the cost is shown."""
    completion_price: float = 0.0
    """Price per million tokens that the judge writes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pattern(self.parse, "parse")
        require(
            self.parse is None or re.compile(self.parse).groups >= 1,
            f"parse = {self.parse}; it needs a group (…) around the verdict.",
        )
        require(self.garbage_retries >= 0, f"garbage_retries = {self.garbage_retries}; it must be 0 or more.")
        require(self.max_tokens >= 1, f"max_tokens = {self.max_tokens}; it must be at least 1.")
        require(0 <= self.temperature < float("inf"), f"temperature = {self.temperature}; it must be 0 or positive.")
        for name in ("prompt_price", "completion_price"):
            require(0 <= getattr(self, name) < float("inf"), f"{name} = {getattr(self, name)}; it must be 0 or positive.")
        require(
            not self.scale or (len(self.scale) == 2 and self.scale[0] < self.scale[1]),
            f"scale = {self.scale}; write the lowest and the highest grade, for example [1, 10].",
        )
        require(not self.scale or self.mode == "grade", f"scale = {self.scale}; it applies to mode = grade; remove it.")
        require(
            self.contradictions == "tie" or (self.mode == "compare" and self.both_orders),
            f"contradictions = {self.contradictions}; it needs mode = compare and both_orders = true.",
        )
        require(not (self.structured and self.parse), "parse is set, but structured verdicts are JSON; remove one of them.")


AnyScorer = (
    RewardModelScorer | ServedRewardModelScorer | PairwiseScorer | MatchScorer | RegexScorer | FunctionScorer | JudgeScorer
)
KINDS: dict[str, type[Any]] = {
    kind.kind: kind
    for kind in (
        RewardModelScorer,
        ServedRewardModelScorer,
        PairwiseScorer,
        MatchScorer,
        RegexScorer,
        FunctionScorer,
        JudgeScorer,
    )
}


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Section):
    """`mpo score`: score generated responses, and combine the scores into a reward."""

    input: str
    """Folder that `mpo generate` wrote, or a .jsonl file of groups."""
    output: str
    """Folder for scored.jsonl and score.json; repeat the command to resume."""
    scorers: dict[str, Options]
    """Scorers by name: `kind` (reward_model, served_reward_model, pairwise, match, regex, function, judge), its options, and
    `weight` (default 1)."""
    combine: Literal["sum", "zscore"] = "sum"
    """The reward is the weighted sum of the raw scores, or of scores standardised within the group (zeros if all are equal)."""
    missing: Literal["error", "drop_response", "drop_group"] = "error"
    """Treatment of missing scores; they are always counted. `error` stops and keeps finished scores."""
    chunk_groups: int = 64
    """Number of groups scored and written at a time."""
    shard: str | None = None
    """`i/n`: part i (from 0) of n of the groups; by default, a Slurm array's task. The last part to finish joins all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.scorers), "scorers is empty; name at least one, for example {exact: {kind: match}}.")
        require(self.chunk_groups >= 1, f"chunk_groups = {self.chunk_groups}; it must be at least 1.")
        if self.shard is not None:
            parse_shard(self.shard)
        for name, options in self.scorers.items():
            build_scorer_config(name, options)
            read_weight(name, options)


def read_weight(name: str, options: Mapping[str, Any]) -> float:
    """The weight of one scorer.

    Raises:
        ConfigError: it is not a finite number.
    """
    weight = options.get("weight", 1.0)
    check_value(float, weight, f"scorers.{name}.weight")
    return float(weight)


def build_scorer_config(name: str, options: Mapping[str, Any]) -> AnyScorer:
    """The dataclass of one scorer.

    Raises:
        ConfigError: the kind or an option is unknown, or a value breaks a rule; names the scorer.
    """
    require(isinstance(options, Mapping), f"scorers.{name} = {show(options)}; set its options, for example {{kind: match}}.")
    kind = options.get("kind")
    require(isinstance(kind, str) and kind in KINDS, f"scorers.{name}.kind = {show(kind)}; choose one of {', '.join(KINDS)}.")
    chosen = KINDS[str(kind)]
    given = {key: value for key, value in options.items() if key not in ("kind", "weight")}
    built: AnyScorer = from_dict(chosen, given, f"scorers.{name}")
    return built


def validate_score(config: ScoreConfig) -> None:
    """Check across fields and against the outside world, before anything loads.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    check_writable(Path(config.output), "output")
    for name, options in config.scorers.items():
        scorer = build_scorer_config(name, options)
        if isinstance(scorer, ModelScorer):
            require(Path(scorer.model).is_dir(), f"scorers.{name}.model = {scorer.model}; no such folder.")
        if isinstance(scorer, ServedRewardModelScorer):
            validate_endpoint(scorer.endpoint, f"scorers.{name}.endpoint")
            require(
                not scorer.tokenizer or Path(scorer.tokenizer).is_dir(),
                f"scorers.{name}.tokenizer = {scorer.tokenizer}; no such folder.",
            )
        if isinstance(scorer, JudgeScorer):
            require(Path(scorer.template).is_file(), f"scorers.{name}.template = {scorer.template}; no such file.")
            validate_endpoint(scorer.endpoint, f"scorers.{name}.endpoint")


def _check_pattern(pattern: str | None, name: str) -> None:
    try:
        re.compile(pattern or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{name} = {pattern}; not a regular expression: {error}.") from error
