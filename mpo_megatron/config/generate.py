"""Options of `mpo generate`, and of endpoints, which other commands also use."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from mpo_megatron.config.checks import check_seed, check_template_options, check_writable, require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(Section, prefix="transformers."):
    """The embedded engine."""

    device: str = "auto"
    """`auto`: the first GPU, or the CPU; or a torch device such as `cuda:1`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is the checkpoint's own, or float32 on a CPU without instructions for bfloat16."""
    batch_size: int = 32
    """Responses generated in one batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, f"transformers.batch_size = {self.batch_size}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class VllmConfig(Section, prefix="vllm."):
    """The offline engine of vLLM."""

    tensor_parallel: int = 1
    """Number of GPUs that share each layer."""
    pipeline_parallel: int = 1
    """Number of GPUs (or groups of them) among which layers are divided."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is the checkpoint's own."""
    memory_fraction: float = 0.9
    """Share of each GPU's memory for vLLM."""
    max_model_len: int | None = None
    """Maximum tokens of prompt plus response; by default the model's own limit."""
    max_in_flight: int = 2048
    """Number of responses passed to the engine at a time; it batches them itself."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, for example `enforce_eager: true`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tensor_parallel", "pipeline_parallel", "max_in_flight"):
            require(getattr(self, name) >= 1, f"vllm.{name} = {getattr(self, name)}; it must be at least 1.")
        require(
            0 < self.memory_fraction <= 1, f"vllm.memory_fraction = {self.memory_fraction}; it must be above 0 and at most 1."
        )
        require(
            self.max_model_len is None or self.max_model_len >= 2,
            f"vllm.max_model_len = {self.max_model_len}; it must be at least 2, or absent.",
        )


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(Section):
    """A server that speaks the OpenAI protocol. The key comes from the environment and is never stored."""

    base_url: str = ""
    """Address up to and including the version, for example `http://localhost:8000/v1`."""
    model: str = ""
    """Name of the model on the server."""
    api: Literal["tokens", "text", "chat"] = "tokens"
    """`tokens`: completions of the same token ids that training uses (vLLM, SGLang); `text`: completions of the rendered prompt,
    which the server tokenizes; `chat`: messages, which the server renders with its own template."""
    server: Literal["auto", "vllm", "sglang", "llamacpp", "transformers", "openai"] = "auto"
    """Kind of server, which determines the settings it is sent; `auto` detects it. `openai`: any other kind, which receives only
    the protocol's own settings."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; if unset, a placeholder is sent."""
    concurrency: int = 64
    """Concurrent requests."""
    timeout: float = 600.0
    """Total seconds that a request may take before it counts as lost."""
    retries: int = 5
    """Number of retries for a lost request (no connection, timeout, 408, 409, 425, 429, 5xx), with growing pauses; honours a
    server's Retry-After."""
    max_wait: float = 60.0
    """Longest pause between retries, in seconds; also limits Retry-After."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "@" not in self.base_url, "base_url holds a user name or password; put the key in the variable api_key_env names."
        )
        require(
            not self.base_url or re.match(r"https?://[^/]", self.base_url) is not None,
            f"base_url = {self.base_url}; it must start with http:// or https://, for example http://localhost:8000/v1.",
        )
        check_url(self.base_url)
        require(self.concurrency >= 1, f"concurrency = {self.concurrency}; it must be at least 1.")
        require(0 < self.timeout < float("inf"), f"timeout = {self.timeout}; it must be a positive number of seconds.")
        require(self.retries >= 0, f"retries = {self.retries}; it must be 0 or more.")
        require(0 <= self.max_wait < float("inf"), f"max_wait = {self.max_wait}; it must be 0 or more seconds.")


def check_url(base_url: str) -> None:
    """Raise `ConfigError` unless an address has a valid host and port, and nothing behind its path."""
    try:
        parts = urlsplit(base_url)
        valid = parts.port != 0 and not parts.query and not parts.fragment and not re.search(r"[\s\x00-\x1f]", base_url)
    except ValueError:  # brackets without an IPv6 address, or a port beyond 65535
        valid = False
    shown = base_url.partition("?")[0]  # a key may follow
    require(valid, f"base_url = {shown}; it must be http://host:port/v1: no `?` or `#`, a port below 65536, IPv6 as [::1].")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """`mpo generate`: sample K responses per prompt from a model."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "prompts",
        "model",
        "output",
        "engine",
        "num_responses",
        "temperature",
        "top_p",
        "max_tokens",
        "shard",
    )

    prompts: str
    """JSONL with one prompt (string or messages) per line; other fields, such as group_id and reference_answer, are kept. Or any
    input or output of `mpo prepare`, for its prompts."""
    model: str
    """Hugging Face checkpoint folder, or a Megatron checkpoint (`mpo convert`, a training run or one of its steps), which is
    exported once beside its weights. For `engine: openai`, the folder with the tokenizer."""
    output: str
    """Folder for samples.jsonl and generate.json; repeat the command to resume."""
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """Engine: the embedded one, vLLM's offline engine, or a server (`endpoint`)."""
    num_responses: int = 8
    """K, the number of responses per prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 selects the likeliest token, which makes all K responses equal."""
    temperatures: list[float] = field(default_factory=list)
    """Several temperatures in one run, instead of `temperature`: response k uses the (k mod n)-th of n, for example [0.6, 0.8,
    1.0] as in MC-PO; each line records its own."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    max_tokens: int = 1024
    """Maximum tokens of a response, including its end token."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response, besides the end token; excluded from it."""
    seed: int = 1234
    """Response k of a group has a seed derived from this, the group's id and k."""
    tokenizer: str | None = None
    """Folder or .model file of the tokenizer, if it is not the model's."""
    system_prompt: str | None = None
    """System message for prompts without one; as in `mpo prepare`."""
    prompt_format: Literal["auto", "chat", "templated"] = "auto"
    """Whether prompts are already templated text; as in `mpo prepare`."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's; as in `mpo prepare`."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template; as in `mpo prepare`."""
    max_prompt_tokens: int = 2048
    """Reject longer prompts, and count them; as in `mpo prepare`."""
    max_prompts: int | None = None
    """Use only the first prompts, at most this many."""
    empty: Literal["keep", "drop", "resample"] = "resample"
    """Treatment of a response of only white space."""
    duplicates: Literal["keep", "drop", "resample"] = "keep"
    """Treatment of a response equal to an earlier one of its group."""
    max_attempts: int = 3
    """Maximum draws per response. After the last draw, an empty or equal response is kept, and an unusable one (filtered,
    aborted, no text) is dropped; both are counted."""
    max_failed: float = 0.0
    """Share of prompts that may fail (endpoint errors) before the command fails; responses that arrived are kept."""
    shard: str | None = None
    """`i/n`: part i (from 0) of n of the prompts; by default, a Slurm array's task. The last part to finish joins all."""
    transformers: TransformersConfig = field(default_factory=TransformersConfig)
    """The embedded engine."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """vLLM's offline engine."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The server of `engine: openai`."""
    load_adapter: bool = False
    """Load the adapter in `model` on the server (vLLM, SGLang) beside the base model `endpoint.model`, and unload it at the end.
    The server must see the adapter's folder under the same path."""

    load_weights: bool = False
    """Make the server (vLLM with VLLM_SERVER_DEV_MODE=1) load the weights of `model` first, from the same path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        check_template_options(self.chat_template_kwargs, prompt_format=self.prompt_format, system_prompt=self.system_prompt)
        for name in ("num_responses", "max_tokens", "max_prompt_tokens", "max_attempts"):
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}; it must be at least 1.")
        require(0 <= self.temperature < float("inf"), f"temperature = {self.temperature}; it must be 0 or positive.")
        for temperature in self.temperatures:
            require(0 <= temperature < float("inf"), f"temperatures = {self.temperatures}; each must be 0 or positive.")
        require(
            not self.temperatures or self.temperature == 1.0,
            f"temperature = {self.temperature}, temperatures = {self.temperatures}; remove one of them.",
        )
        require(
            len(self.temperatures) <= self.num_responses,
            f"temperatures = {self.temperatures}; num_responses = {self.num_responses} is smaller, so some would not "
            "be used; raise it.",
        )
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}; it must be above 0 and at most 1.")
        require(self.top_k >= 0, f"top_k = {self.top_k}; it must be 0 (all tokens) or positive.")
        require(all(self.stop), "stop contains an empty text, which would end every response at once; remove it.")
        require(self.max_prompts is None or self.max_prompts >= 1, f"max_prompts = {self.max_prompts}; it must be at least 1.")
        require(0 <= self.max_failed < 1, f"max_failed = {self.max_failed}; it is a share: at least 0 and below 1.")
        require(
            min([self.temperature, *self.temperatures]) > 0 or self.duplicates != "resample",
            "duplicates = resample, temperature = 0: redrawing gives the same text; raise temperature, or set "
            "duplicates to keep or drop.",
        )
        if self.shard is not None:
            parse_shard(self.shard)


def parse_shard(text: str) -> tuple[int, int]:
    """The part and the number of parts in `i/n`.

    Raises:
        ConfigError: the text has another form, or i is not below n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    require(match is not None, f"shard = {text}; write i/n, for example 0/8 … 7/8.")
    assert match is not None
    index, total = int(match[1]), int(match[2])
    require(index < total, f"shard = {text}; parts are counted from 0: choose 0/{total} … {total - 1}/{total}.")
    return index, total


def validate_generate(config: GenerateConfig) -> None:
    """Check across fields and against the outside world, before anything loads.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    check_writable(Path(config.output), "output")
    for name, default in (("vllm", VllmConfig()), ("transformers", TransformersConfig())):
        require(
            config.engine == name or getattr(config, name) == default,
            f"{name}.* is set, but engine = {config.engine} does not read it; set engine = {name}, or remove it.",
        )
    if config.engine == "openai":
        validate_endpoint(config.endpoint, "endpoint")
        require(
            not (config.load_adapter and config.load_weights),
            "load_adapter = true, load_weights = true; a policy is an adapter or a whole model: remove one of them.",
        )
    else:
        require(
            not config.load_weights,
            f"load_weights = true applies to a server (engine = openai); engine = {config.engine} loads the model "
            "anyway: remove it.",
        )
        require(
            not config.load_adapter,
            f"load_adapter = true applies to a server (engine = openai); engine = {config.engine} loads adapters anyway: remove "
            "it.",
        )
        require(
            config.endpoint == EndpointConfig(),
            f"endpoint is set, but engine = {config.engine} uses none; set engine = openai, or remove it.",
        )


def validate_endpoint(config: EndpointConfig, name: str) -> None:
    """Check that an endpoint has an address and a model.

    Raises:
        ConfigError: names the field.
    """
    require(
        bool(config.base_url),
        f"{name}.base_url is missing; set it to the server's address, for example http://localhost:8000/v1.",
    )
    require(bool(config.model), f"{name}.model is missing; set it to the model's name on the server.")
