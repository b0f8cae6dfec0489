"""Options of `mpo score`: a scorer is one dataclass a kind, chosen by `kind`."""

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
    """What scorers that are Hugging Face models have in common."""

    model: str
    """Checkpoint folder."""
    device: str = "auto"
    """`auto` takes the first GPU (under torchrun, the rank's own), or the CPU; `balanced` spreads a model that is too large for
    one over all GPUs, layer by layer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` is the checkpoint's own."""
    batch_size: int = 16
    """Sequences to score in one batch."""
    max_length: int = 4096
    """Longest sequence, in tokens; the model's own limit holds as well."""
    too_long: Literal["error", "missing"] = "error"
    """A longer sequence is never cut: it stops the command, which names it, or its score counts as missing."""
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
    """A reward model that a server of vLLM's or SGLang's runs."""

    kind: ClassVar[str] = "served_reward_model"
    endpoint: EndpointConfig
    """The server and the model's name there; the endpoints are found beside the `/v1` of `base_url`."""
    api: Literal["classify", "pooling", "score"] = "classify"
    """`classify` (vLLM, SGLang) and `pooling` (vLLM): the one output for the conversation; `score` (vLLM): that of a
    cross-encoder for prompt and response as two texts."""
    tokenizer: str = ""
    """Folder of the reward model's tokenizer with its chat template; `api: score` needs none."""
    max_length: int = 4096
    """Longest sequence, in tokens; the server's own limit holds as well."""
    too_long: Literal["error", "missing"] = "error"
    """A longer sequence is never cut: it stops the command, which names it, or its score counts as missing."""

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
    """A cross-encoder that says how likely response a beats response b (PairRM); the score is the share of comparisons won."""

    kind: ClassVar[str] = "pairwise"
    comparisons: Literal["all", "tournament"] = "all"
    """`all`: every pair, K(K−1)/2 of them; `tournament`: about K·log₂K, each response against others that won as often."""
    both_orders: bool = True
    """Ask each pair in both orders and take the mean, which removes position bias."""
    template: str = "<|source|>{prompt}<|candidate1|>{a}<|candidate2|>{b}"
    """How prompt and candidates become one text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("{prompt}", "{a}", "{b}"):
            require(self.template.count(name) == 1, f"template = {self.template}; it needs {name} once.")


@dataclass(frozen=True, kw_only=True)
class MatchScorer(Section):
    """1 if the answer extracted from a response equals the group's reference answer, else 0."""

    kind: ClassVar[str] = "match"
    field: str = "reference_answer"
    """Field of the group line that holds the answer (a list: any of them counts); `meta.x` for a field under meta."""
    mode: Literal["exact", "numeric"] = "exact"
    """Compare as text without surrounding white space, or as numbers: 1,000 = 1e3 = 1000.0 = 2000/2."""
    extract: str | None = None
    """Regular expression whose last match in the response (its first group, if it has one) is the answer; by default the whole
    response (exact) or its last number (numeric)."""
    ignore_case: bool = False
    """For mode = exact."""
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
    """The expression, in Python's syntax; `(?s)` and the like set flags."""
    full: bool = False
    """Require a match of the whole response."""
    found: float = 1.0
    """Score where it matches."""
    absent: float = 0.0
    """Score where it does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pattern(self.pattern, "pattern")


@dataclass(frozen=True, kw_only=True)
class FunctionScorer(Section):
    """A Python function of yours, called by the names of its parameters; None counts as missing.

    One response a call: `response` (or completion, solution_str), `prompt`, `messages`, `group`, and a group's field by its name.
    One group a call, which returns K numbers: `responses` with `prompt`, `messages` or `group`.
    Many responses a call, every argument a list, as TRL calls it: `completions` (or responses, solution_strs) without them.
    """

    kind: ClassVar[str] = "function"
    function: str
    """`package.module:function` or `path/to/file.py:function`."""
    params: Options = field(default_factory=dict)
    """Keyword arguments for it."""
    timeout: float = 60.0
    """Seconds that one call may take; after that its scores are missing, and its process is restarted."""

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
    """File with a Jinja template of the question to the judge; it sees prompt, messages, group, and response, or a and b."""
    mode: Literal["grade", "compare"] = "grade"
    """`grade`: one number a response; `compare`: which of two is better, the score being the share of comparisons won."""
    parse: str | None = None
    """Regular expression whose last match's first group is the verdict: a number (grade), or A, B or tie (compare). By default
    the usual forms are read: "Score: 7", "[[7]]", "Verdict: A", "[[A>>B]]", <verdict>A</verdict>, and JSON with such a key."""
    scale: list[float] = field(default_factory=list)
    """For mode = grade: lowest and highest grade; a number outside is no verdict."""
    structured: bool = False
    """Have the server force the verdict into JSON by a schema, {"reason": …, "score": …} or {"reason": …, "winner": …}: vLLM,
    SGLang, llama.cpp and others do; `transformers serve` ignores schemas and is refused."""
    comparisons: Literal["all", "tournament"] = "all"
    """For mode = compare: which pairs are asked, as for the kind pairwise."""
    temperature: float = 0.0
    """Of the judge."""
    max_tokens: int = 1024
    """Longest verdict; a truncated one counts as none."""
    garbage_retries: int = 2
    """How often to ask again after an answer without a verdict; then the score is missing."""
    both_orders: bool = True
    """For mode = compare: ask each pair in both orders, which removes position bias."""
    contradictions: Literal["tie", "missing", "group_missing"] = "tie"
    """For both_orders: how to count a pair whose orders disagree: as a tie; not at all; or by dropping the scores of its group
    (SPO keeps a ranking only if both orders give it)."""
    prompt_price: float = 0.0
    """Price of a million tokens that the judge reads; with it, the cost is shown."""
    completion_price: float = 0.0
    """Price of a million tokens that the judge writes."""

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
        require(not self.scale or self.mode == "grade", f"scale = {self.scale}; it is for mode = grade; remove it.")
        require(
            self.contradictions == "tie" or (self.mode == "compare" and self.both_orders),
            f"contradictions = {self.contradictions}; it needs mode = compare and both_orders = true.",
        )
        require(not (self.structured and self.parse), "parse is set, and structured verdicts are JSON; leave one of them out.")


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
    """By name: `kind` (reward_model, served_reward_model, pairwise, match, regex, function, judge) with its options, and `weight`
    (default 1)."""
    combine: Literal["sum", "zscore"] = "sum"
    """The reward is the weighted sum of the scores as they are, or standardised within the group (all equal: 0) first."""
    missing: Literal["error", "drop_response", "drop_group"] = "error"
    """What to do where a scorer has no score; it is always counted. `error` stops and keeps what is scored."""
    chunk_groups: int = 64
    """Groups to score and write at a time."""
    shard: str | None = None
    """`i/n`: part i (from 0) of n of the groups; by default a Slurm array's task. The last part to finish joins all."""

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
        ConfigError: the kind or an option is unknown, or a value breaks a rule; it names the scorer.
    """
    require(isinstance(options, Mapping), f"scorers.{name} = {show(options)}; give its options, for example {{kind: match}}.")
    kind = options.get("kind")
    require(isinstance(kind, str) and kind in KINDS, f"scorers.{name}.kind = {show(kind)}; choose one of {', '.join(KINDS)}.")
    chosen = KINDS[str(kind)]
    given = {key: value for key, value in options.items() if key not in ("kind", "weight")}
    built: AnyScorer = from_dict(chosen, given, f"scorers.{name}")
    return built


def validate_score(config: ScoreConfig) -> None:
    """Check what concerns several fields, and the world outside, before anything loads.

    Raises:
        ConfigError: naming the field, the rule and the fix.
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
