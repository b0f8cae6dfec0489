"""Chat templates of real models: those included in trl (Apache-2.0), and imitations of two others."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]
MISTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {%- if tools is defined and tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '[TOOL_CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user, assistant and tool roles are supported.') }}{%- endif %}
{%- endfor %}
"""
"""Layout of tools, calls and results in Mistral's template (version 3): there is no generation prompt."""
END_TOKENS = {
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<eos>"),
    "gemma3": ("<bos>", "<eos>"),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "mistral": ("<s>", "</s>"),
}
"""Begin- and end-of-text tokens; ChatML's for the others."""
TEMPLATES = (
    *("qwen2_5", "qwen3", "qwen3_thinking", "qwen3_5_think", "qwen3_6", "deepseek_r1_distill"),
    *("llama3_1", "mistral", "gemma", "gemma3"),
)


def read_template(name: str) -> str:
    """The Jinja text of a template."""
    if name == "mistral":
        return MISTRAL
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl brings the templates")
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    if name == "qwen3_thinking":  # Qwen3-…-Thinking-2507: Qwen3's, and the prompt opens the thought
        text = (folder / "qwen3.jinja").read_text()
        head, cue, _ = text.partition("{%- if add_generation_prompt %}")
        return head + cue + "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    return (folder / f"{name}.jinja").read_text()
