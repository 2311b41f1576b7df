"""Chat templates: the same prompts as transformers', and nothing that a hostile template can do."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from helios import chat_template
from helios.chat_template import ChatRenderer, ChatTemplate, check_chat_template, read_chat_template
from helios.errors import CheckpointError, HeliosError, InvalidRequestError

SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

# Templates in the manner of models that people run. ChatML with a default system message (SmolLM2):
SMOL = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# The system message goes into the first user's; roles must alternate (Llama 2):
LLAMA_2 = """{% set ns = namespace(system='') %}
{% if messages[0]['role'] == 'system' %}
{% set ns.system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
{% set messages = messages[1:] %}
{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}
{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + (ns.system if loop.first else '') + m['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}
{% endfor %}"""
# Headers, the date, and an assistant's text that is marked for training (Llama 3):
LLAMA_3 = """{{- bos_token }}
{%- if strftime_now is defined %}{%- set date = strftime_now('%Y') %}{%- endif %}
{%- if not messages or messages[0].role != 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear: ' + date + '<|eot_id|>' }}{% endif %}
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {{- header }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# Tools in the system message, if there are any, and JSON (Qwen 2.5):
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content | tojson(indent=1)) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

USER = [{"role": "user", "content": "  What is <b>Helios</b>? Größe, 日本 🙂\n"}]
LONG = [
    {"role": "system", "content": "You know the sun."},
    *USER,
    {"role": "assistant", "content": "A god. "},
    {"role": "user", "content": "And <|im_end|> a server?"},
]


def write_checkpoint(path: Path, template: str) -> Path:
    """A tokenizer that puts `<s>` before each text, with a chat template, as transformers writes it."""
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(path)
    return path


def renderer(text: str) -> ChatRenderer:
    return ChatRenderer("tiny", ChatTemplate(text, {"bos_token": "<s>"}, "chat_template.jinja"))


@pytest.mark.parametrize("messages", [USER, LONG], ids=["user", "long"])
@pytest.mark.parametrize(
    "text", [SMOL, LLAMA_2, LLAMA_3, QWEN], ids=["smollm2", "llama-2", "llama-3", "qwen-2.5"]
)
def test_ids_are_those_of_transformers(text: str, messages: list[dict[str, str]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_checkpoint(tmp_path / "model", text)
    reference = AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    template = read_chat_template(path)
    assert template is not None
    with ChatRenderer("tiny", template) as own:
        prompt = own.render(messages)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == reference
    assert list(reference).count(0) == (
        len([m for m in messages if m["role"] == "user"]) if "INST" in text else int("bos_token" in text)
    ), "the start token is not added twice"


def test_the_template_is_found_wherever_checkpoints_have_it(tmp_path: Path) -> None:
    def write(name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def found() -> tuple[str, str] | None:
        template = read_chat_template(tmp_path)
        return None if template is None else (template.text, template.source)

    assert found() is None
    write("tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})
    assert found() is None
    write("chat_template.json", {"chat_template": "oldest"})
    assert found() == ("oldest", "chat_template.json: chat_template")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write("tokenizer_config.json", {"chat_template": named[:1]})
    assert found() == ("oldest", "chat_template.json: chat_template")
    write("tokenizer_config.json", {"chat_template": named})
    assert found() == ("plain", "tokenizer_config.json: chat_template")
    write("tokenizer_config.json", {"chat_template": "a field", "bos_token": {"content": "<s>"}})
    assert found() == ("a field", "tokenizer_config.json: chat_template")
    write("chat_template.jinja", "a file\n")
    write("special_tokens_map.json", {"bos_token": "<other>", "eos_token": "</s>"})
    assert found() == ("a file\n", "chat_template.jinja")
    template = read_chat_template(tmp_path)
    assert template is not None
    assert template.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("wrong", [7, ["x"], [{"name": "default"}], [{"name": "default", "template": 7}]])
def test_a_field_that_is_no_template_is_refused_by_file_and_name(wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: .*chat_template"):
        read_chat_template(tmp_path)


def test_the_id_changes_with_text_and_special_tokens() -> None:
    templates = [
        ChatTemplate("a", {"bos_token": "<s>", "eos_token": "</s>"}, "x"),
        ChatTemplate("a", {"eos_token": "</s>", "bos_token": "<s>"}, "y"),
        ChatTemplate("b", {"bos_token": "<s>", "eos_token": "</s>"}, "x"),
        ChatTemplate("a", {"bos_token": "<s>"}, "x"),
    ]
    first, same, *others = (template.template_id for template in templates)
    assert first == same
    assert len({first, *others}) == 3


def test_the_templates_own_reason_is_passed_on_in_one_line() -> None:
    with (
        renderer("{{ raise_exception('Only\nuser roles are ' ~ messages[0].role) }}") as own,
        pytest.raises(
            InvalidRequestError,
            match=r"of tiny \(chat_template\.jinja\) refuses these messages: Only user roles are user$",
        ),
    ):
        own.render(USER)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ messages[7].content.x }}", "UndefinedError"),
        ("{{ tools | length }}", "TypeError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        # Neither Python's internals, nor files, nor other templates can be reached.
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_what_fails_on_the_messages_is_the_requests_fault_and_the_next_one_is_rendered(
    text: str, reason: str
) -> None:
    with renderer("{% if messages[0].content == 'fail' %}" + text + "{% else %}fine{% endif %}") as own:
        with pytest.raises(InvalidRequestError, match=reason):
            own.render([{"role": "user", "content": "fail"}])
        assert own.render(USER) == "fine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for x in %}", "not a valid template: Expected an expression"),
        ("{% tool %}", "not a valid template: Encountered unknown tag"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "CPU time"),
        ("{{ 10 ** (10 ** 10) }}", "CPU time"),
        ("{{ messages[0].content * 10 ** 10 }}", "too much memory"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ 'a'.center(10 ** 11) }}", "too much memory"),
        ("{{ '%100000000000d' % 1 }}", "too much memory"),
        ("{{ 'x' | indent(10 ** 12) }}", "too much memory"),
        ("{{ [1] | batch(10 ** 10, 1) | list }}", "too much memory"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "too much memory",
        ),
        ("{% for i in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}", "too long"),
    ],
)
def test_no_template_gets_unbounded_time_or_memory(text: str, reason: str) -> None:
    with renderer(text) as own:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=reason):
                own.render(USER)


def test_a_renderer_that_was_killed_is_replaced() -> None:
    with renderer("{{ messages[0].role }}") as own:
        assert own.render(USER) == "user"
        assert own._process is not None
        own._process.kill()
        assert own.render(USER) == "user"


def test_closing_ends_a_renderer_that_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(chat_template, "_CPU_SECONDS", 600.0)
    own = renderer("{{ 10 ** (10 ** 10) }}")
    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(own.render, USER)
        while own._process is None:
            time.sleep(0.01)
        own.close()
        with pytest.raises(HeliosError):
            rendering.result()


def test_code_that_escapes_the_sandbox_finds_no_files_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HELIOS_GATEWAY_REDIS_URL", "redis://:secret@localhost")
    with renderer("x") as own:
        own.render(USER)
        assert own._process is not None
        process = Path(f"/proc/{own._process.pid}")
        assert b"secret" not in (process / "environ").read_bytes()
        limits = (process / "limits").read_text()
    for limit in ("Max open files", "Max file size", "Max processes"):
        (line,) = (line for line in limits.splitlines() if line.startswith(limit))
        assert line.removeprefix(limit).split()[:2] == ["0", "0"]


def test_a_template_that_cannot_render_a_users_message_is_refused_when_the_model_is_checked(
    tmp_path: Path,
) -> None:
    check_chat_template(tmp_path, "tiny")
    file = tmp_path / "chat_template.jinja"
    file.write_text(QWEN)
    check_chat_template(tmp_path, "tiny")
    for text in ("{{ tools | length }}", "{{ raise_exception('tools are required') }}", "{% if %}"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
            check_chat_template(tmp_path, "tiny")
