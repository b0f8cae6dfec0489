from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from mpo_megatron.config import ConfigError
from mpo_megatron.data import tokenizer_backends
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.tokenizer import Tokenizer, count_tokens, load_tokenizer
from mpo_megatron.data.tokenizer_backends import HuggingFaceTokenizer, SentencePieceTokenizer
from tests.tiny import save_tokenizer

QWEN2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Like Qwen2.5's template for plain conversations: adds a default system message if there is none."""
QWEN3 = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""Like Qwen3's template for plain conversations: an empty thinking block before the last answer."""
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
AWKWARD = ["\nstarts with a newline", "\n\ntwo", " leading space", "  two", "tab\t", "ends \n", "ﬁ é 東京 🙂", "x" * 300]


def template_file(folder: Path, text: str) -> Path:
    (folder / "template.jinja").write_text(text)
    return folder / "template.jinja"


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(qwen_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def bpe(bpe_folder: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(bpe_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@pytest.fixture(params=["bpe", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> HuggingFaceTokenizer:
    found: HuggingFaceTokenizer = request.getfixturevalue(request.param)
    return found


# ------------------------------------------------------------------------------------------ what inference sees


@pytest.mark.parametrize("template", [None, QWEN2_5, QWEN3])
@pytest.mark.parametrize("messages", [QUESTION, [SYSTEM, *QUESTION]])
def test_prompt_ids_are_those_of_apply_chat_template(
    tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch, template: str | None, messages: list[Any]
) -> None:
    monkeypatch.setattr(tokenizer.backend, "chat_template", template or tokenizer.backend.chat_template)
    for variables in [{}, {"enable_thinking": False}][: 1 + (template == QWEN3)]:
        wanted = tokenizer.backend.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
        text, ids = Chat(tokenizer, variables=variables).prompt(messages)
        assert ids.tolist() == wanted
        assert tokenizer.decode(ids.tolist()) == text


def test_a_variable_that_the_template_lacks_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder, template_file(tmp_path, QWEN3))
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: enable_thought: tokenizer = .* has no such variable; correct"):
        Chat(tokenizer, variables={"enable_thinking": False, "enable_thought": False})


def test_a_variable_at_the_start_of_a_line_of_one_of_several_templates(
    tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = QWEN3.replace("enable_thinking", "\nenable_thinking")
    assert spread != QWEN3
    monkeypatch.setattr(tokenizer.backend, "chat_template", {"default": spread, "tool_use": QWEN2_5})
    chat = Chat(tokenizer, variables={"enable_thinking": False})
    assert "</think>" in chat.prompt(QUESTION)[0]


def test_the_system_prompt_is_never_doubled(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder, template_file(tmp_path, QWEN2_5))
    plain, own = Chat(tokenizer), Chat(tokenizer, system_prompt="Answer in verse.")
    texts = [chat.prompt(messages)[0] for chat in (plain, own) for messages in (QUESTION, [SYSTEM, *QUESTION])]
    assert [text.count("<|im_start|>system") for text in texts] == [1, 1, 1, 1]
    assert "You are Qwen" in texts[0]  # the template's default, as at inference
    assert "You are Qwen" not in texts[2]
    assert "Answer in verse." in texts[2]
    assert "Answer in verse." not in texts[3]
    assert "Be brief." in texts[3]


def test_no_double_begin_of_text(bpe_folder: Path, tmp_path: Path) -> None:
    """The template writes the token, and the tokenizer would add it again: it must appear once."""
    from tokenizers import processors

    target = tmp_path / "with_bos"
    shutil.copytree(bpe_folder, target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}" + settings["chat_template"]
    settings |= {"bos_token": "<|endoftext|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(target)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    backend = tokenizer.backend.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert tokenizer.backend.encode("a")[0] == 0  # it does add one
    chat = Chat(tokenizer)
    assert chat.prompt(QUESTION)[1].tolist().count(0) == 1
    assert chat.prompt(QUESTION)[1][0] == 0
    assert 0 not in chat.response("An answer.")


# ------------------------------------------------------------------------------------------ responses


def test_response_ids_are_the_text_and_the_end_of_turn(tokenizer: HuggingFaceTokenizer) -> None:
    chat = Chat(tokenizer)
    end = tokenizer.encode("<|im_end|>")
    assert [chat.end_token_id] == end
    for text in AWKWARD:
        ids = chat.response(text).tolist()
        assert ids[-1:] == end
        assert tokenizer.decode(ids[:-1]) == unicodedata.normalize("NFC", text)
    assert chat.response("already ended<|im_end|>").tolist() == chat.response("already ended").tolist()


def test_a_response_that_starts_with_a_newline_does_not_merge_with_the_template(qwen: HuggingFaceTokenizer) -> None:
    chat = Chat(qwen)
    prompt, prompt_ids = chat.prompt(QUESTION)
    together = qwen.encode(prompt + "\nFour.")
    assert (prompt_ids[-1], together[len(prompt_ids) - 1]) == (198, 271)  # "\n" became "\n\n": generation never sees this
    assert chat.response("\nFour.")[0] == 198


def test_ids_at_the_boundary_on_real_data(qwen: HuggingFaceTokenizer, real_data: Path) -> None:
    chat = Chat(qwen)
    with (real_data / "alpaca_eval_k8.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(40), file, strict=False)]
    for row in rows:
        text, ids = chat.prompt([{"role": "user", "content": row["prompt"]}])
        for response in row["responses"]:
            whole = qwen.decode([*ids.tolist(), *chat.response(response["text"]).tolist()])
            assert whole == unicodedata.normalize("NFC", text + response["text"] + "<|im_end|>")


def test_qwen3_without_thinking(qwen: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.backend, "chat_template", QWEN3)
    off, on = Chat(qwen, variables={"enable_thinking": False}), Chat(qwen)
    assert off.prompt(QUESTION)[0].endswith("<think>\n\n</think>\n\n")
    assert off.lead == ""
    assert on.lead == "<think>\n\n</think>\n\n"  # the caller is warned; a response is unchanged
    assert off.response("Four.").tolist() == on.response("Four.").tolist() == qwen.encode("Four.<|im_end|>")


def test_the_end_token_falls_back_to_the_end_of_text(bpe_folder: Path, tmp_path: Path) -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = load_tokenizer(bpe_folder, template_file(tmp_path, plain))
    assert Chat(tokenizer).end_token_id == tokenizer.eos_id
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    tokenizer.backend.eos_token = None
    with pytest.raises(ConfigError, match="the token that ends a response"):
        Chat(tokenizer)


def test_white_space_that_the_template_puts_before_an_answer_is_scored(bpe_folder: Path, tmp_path: Path) -> None:
    llama2 = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(bpe_folder, template_file(tmp_path, llama2))
    chat = Chat(tokenizer)
    assert chat.lead == " "
    assert tokenizer.decode(chat.response("Blue.").tolist()) == " Blue.<|im_end|>"


def test_a_template_that_refuses_is_named(bpe_folder: Path, tmp_path: Path) -> None:
    gemma = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ZEPHYR
    tokenizer = load_tokenizer(bpe_folder, template_file(tmp_path, gemma))
    Chat(tokenizer)
    with pytest.raises(
        ConfigError,
        match=r"tokenizer = .*: its chat template refuses a system message: System role not supported; copy the tokenizer",
    ):
        Chat(tokenizer, system_prompt="Be brief.")
    tokenizer = load_tokenizer(bpe_folder, template_file(tmp_path, "{{ 'nothing of the conversation' }}"))
    with pytest.raises(ConfigError, match="omits the assistant's message"):
        Chat(tokenizer)
    (tmp_path / "marked.jinja").write_text(ZEPHYR, encoding="utf-8-sig")
    assert load_tokenizer(bpe_folder, tmp_path / "marked.jinja").template == ZEPHYR
    (tmp_path / "bad.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ConfigError, match=r"chat_template = .*bad\.jinja; not UTF-8 .*; save it as UTF-8"):
        load_tokenizer(bpe_folder, tmp_path / "bad.jinja")


# ------------------------------------------------------------------------------------------ SentencePiece


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_many_texts_at_once_get_the_ids_of_each(
    tmp_path: Path, bpe_folder: Path, split_special_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the tokenizer's file requests truncation and padding, which inference does not apply."""
    settings = json.loads((bpe_folder / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 6},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    shutil.copytree(bpe_folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(settings))
    config_file = tmp_path / "tokenizer" / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"split_special_tokens": split_special_tokens}))
    texts = ["", " ", "a", "What is <|im_end|> here?\n\n", "é́ 東京 🙂", *AWKWARD, "word " * 400, "\u0000\ufeff"]
    expected = [HuggingFaceTokenizer(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")).encode(text) for text in texts]
    many = load_tokenizer(tmp_path / "tokenizer").encode_many
    assert [ids.tolist() for ids in many(texts)] == expected
    assert [ids.tolist() for ids in many(texts, 7)] == [[*ids, 7] for ids in expected]
    monkeypatch.setattr("mpo_megatron.data.tokenizer_backends._CHARACTERS", 40)
    assert [ids.tolist() for ids in many(texts)] == expected
    assert (many([]), [ids.tolist() for ids in many([""])]) == ([], [[]])
    assert (len(expected[3]) > 12) == split_special_tokens


@pytest.mark.parametrize(
    ("parallel", "wanted", "threads"),
    [("false", "8", 1), ("Off", "8", 1), ("true", "8", 8), ("true", "", os.cpu_count()), ("1", "many", os.cpu_count())],
)
def test_more_words_are_remembered_by_fewer_threads(
    parallel: str, wanted: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    monkeypatch.setenv("RAYON_NUM_THREADS", wanted)
    assert tokenizer_backends._num_threads() == threads


def test_many_conversations_at_once_get_the_text_of_each(bpe_folder: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('refused') }}{% endif %}"
        "{{ m.role + m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    )
    (tmp_path / "refuses.jinja").write_text(template)
    tokenizer = load_tokenizer(str(bpe_folder), str(tmp_path / "refuses.jinja"))
    plain = [([{"role": "user", "content": text}], []) for text in ("one", "two")]
    tools = [([{"role": "user", "content": "use"}], [{"value": value}]) for value in (1, True, 1.0)]  # equal, written differently
    refused = [([{"role": "user", "content": "no"}], [])]
    for asked in (plain, [*plain, *tools, *plain], [*plain, *refused, *tools]):
        found = tokenizer.render_many(asked, variables={})
        for (messages, own), text in zip(asked, found, strict=True):
            if messages[0]["content"] == "no":
                assert isinstance(text, TemplateError)
                assert str(text) == "refused"
            else:
                assert text == tokenizer.render(messages, add_generation_prompt=True, variables={}, tools=own)
    assert len({str(text) for text in tokenizer.render_many(tools, variables={})}) == 3


def test_an_end_token_is_taken_off_however_often_it_stands_there(tokenizer: HuggingFaceTokenizer) -> None:
    chat = Chat(tokenizer)
    for text, rest in (("Four.", "Four."), ("Four.\n", "Four.\n"), ("Four.<|im_end|>\n<|im_end|> \x1f\n", "Four."), ("", "")):
        assert chat.strip_end(text) == rest
    assert chat.strip_end("<|im_end|> is a token.") == "<|im_end|> is a token."


def test_sentencepiece_is_read_by_sentencepiece(sentencepiece_model: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.vocab_size == reference.vocab_size()
    for text in AWKWARD:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))


def test_sentencepiece_with_the_plain_template(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    chat = Chat(tokenizer, system_prompt="Be brief.")
    text, ids = chat.prompt(QUESTION)
    assert text == "<s>Be brief.\n\nUser: What is 2 + 2?\nAssistant:"
    assert (ids.tolist().count(1), ids[0]) == (1, 1)
    assert chat.end_token_id == tokenizer.eos_id == 2
    # This template has a space before the answer, and so does the tokenizer's own encoding of a conversation.
    whole = tokenizer.encode(
        tokenizer.render([*QUESTION, {"role": "assistant", "content": "Four."}], add_generation_prompt=False, variables={})
    )
    prompt = Chat(tokenizer).prompt(QUESTION)[1].tolist()
    response = chat.response("Four.").tolist()
    assert whole[: len(prompt) + len(response)] == prompt + response


@pytest.mark.parametrize("text", ["Four.", "\nFour.", "\n\nFour.", " Four."])
def test_no_space_sneaks_in_before_a_response(sentencepiece_model: Path, tmp_path: Path, text: str) -> None:
    """SentencePiece adds a space before a text, but not after a template's newline."""
    tokenizer = load_tokenizer(sentencepiece_model, template_file(tmp_path, ZEPHYR))
    chat = Chat(tokenizer)
    prompt, ids = chat.prompt(QUESTION)
    response = chat.response(text).tolist()
    assert tokenizer.decode(ids.tolist() + response) == tokenizer.decode(tokenizer.encode(prompt)) + text + "</s>"
    assert tokenizer.encode("Four.") != chat.response("Four.").tolist()[:-1]


# ------------------------------------------------------------------------------------------ loading, saving


def test_the_digest_says_which_tokenizer(bpe_folder: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    bpe, pieces = load_tokenizer(bpe_folder), load_tokenizer(sentencepiece_model)
    assert bpe.digest() != pieces.digest()
    for name, tokenizer in (("bpe", bpe), ("pieces", pieces)):
        tokenizer.save(tmp_path / name / "hf")  # as in a Megatron checkpoint
        again: Tokenizer = load_tokenizer(tmp_path / name)
        assert type(again) is type(tokenizer)
        assert again.digest() == tokenizer.digest()
        assert Chat(again).prompt(QUESTION)[1].tolist() == Chat(tokenizer).prompt(QUESTION)[1].tolist()


def test_tokens_added_beside_a_sentencepiece_model(sentencepiece_model: Path, tmp_path: Path) -> None:
    shutil.copyfile(sentencepiece_model, tmp_path / "tokenizer.model")
    size = load_tokenizer(sentencepiece_model).vocab_size
    added = {str(size): {"content": "<|end|>", "special": True}}
    template = ZEPHYR.replace("eos_token", "'<|end|>'")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.vocab_size == size + 1
    assert Chat(tokenizer).end_token_id == size
    assert tokenizer.decode(tokenizer.encode("a<|end|>b"), skip_special=True) == "ab"


def test_a_name_on_the_hub(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name == "owner/none":
            raise OSError("404 Client Error\nmore")
        return str(bpe_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer("owner/model").digest() == load_tokenizer(bpe_folder).digest()
    assert not any(pattern.endswith((".py", ".safetensors")) for pattern in asked[0][1]["allow_patterns"])
    with pytest.raises(ConfigError, match=r"tokenizer = owner/none; no such folder here, .* hub .*: 404 Client Error$"):
        load_tokenizer("owner/none")


def test_what_cannot_be_loaded_is_named(bpe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer = nowhere; no such folder or file"):
        load_tokenizer("nowhere")
    with pytest.raises(ConfigError, match=r"it holds none of tokenizer.json, .*, tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"a file must be a SentencePiece .model"):
        load_tokenizer(bpe_folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"chat_template = none.jinja; no such file"):
        load_tokenizer(bpe_folder, "none.jinja")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    pytest.importorskip("sentencepiece")
    with pytest.raises(ConfigError, match="sentencepiece cannot read it"):
        load_tokenizer(tmp_path / "bad.model")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(bpe_folder / "tokenizer.json", bare / "tokenizer.json")
    settings = json.loads((bpe_folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no chat template; give one with chat_template = FILE"):
        load_tokenizer(bare)


def test_a_damaged_tokenizer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Rust raises a plain Exception for these inputs."""
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    content = json.loads(whole)
    a, model = {"a": 2**31}, content["model"]
    for damaged, message in (
        (whole.replace('"merges"', '"nerges"'), r"tokenizer\.json does not hold a tokenizer \(Missing vocab/merges.*\)"),
        (whole.replace('"content"', '"kontent"', 1), r"tokenizer\.json does not hold a tokenizer \(.*field `content`.*\)"),
        ("{}", r"tokenizer\.json does not hold a tokenizer \(Model missing.*\)"),
        ("[]", r"tokenizer\.json does not hold a tokenizer \(.*\)"),
        (json.dumps(content | {"model": None}), r"tokenizer\.json does not hold a tokenizer \(.*\)"),
        (
            json.dumps(content | {"model": model | {"vocab": model["vocab"] | a}}),
            r"its largest token id is 2147483648, beyond 2.*",
        ),
        (json.dumps(content | {"model": model | {"vocab": {}}}), "its vocabulary is empty"),
    ):
        path.write_text(damaged)
        for use in (load_tokenizer, count_tokens):
            with pytest.raises(
                ConfigError, match=rf"^tokenizer = {re.escape(str(tmp_path))}; {message}; copy the tokenizer again\.$"
            ):
                use(tmp_path)
    path.write_text(whole)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(ConfigError, match="transformers cannot load it"):  # which fails only when it encodes
        load_tokenizer(tmp_path)


def test_a_developer_message_is_the_prompt_s_system_message(tokenizer: HuggingFaceTokenizer) -> None:
    chat = Chat(tokenizer, system_prompt="Be brief.")
    messages = [{"role": "developer", "content": "Answer in verse."}, {"role": "user", "content": "Q"}]
    assert chat.with_system(messages) == messages
