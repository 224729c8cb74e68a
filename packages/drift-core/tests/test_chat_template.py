from __future__ import annotations

import threading
from datetime import datetime

import pytest

import drift_core.chat_template as limits
from drift_core.chat_template import ChatTemplate, ChatTemplateError

TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, what's 1 < 2?"},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Why?"},
]

# Written in the manner of published templates: Llama 3, Qwen, Mistral.
TEMPLATES = {
    "headers": (
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {{- '<|start|>' + message['role'] + '<|head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start|>assistant<|head|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "im": (
        "{%- if messages[0].role == 'system' %}\n    {{- '<|im|>system\\n' + messages[0].content + '\\n' }}\n"
        "{%- else %}\n    {{- '<|im|>system\\ndefault\\n' }}\n{%- endif %}\n"
        "{%- set ns = namespace(last=-1) %}\n"
        "{%- for message in messages[::-1] %}\n{%- set ns.last = loop.index0 %}\n{%- endfor %}\n"
        "{%- for m in messages if m.role != 'system' %}\n<|im|>{{ m.role }} {{ loop.index }}/{{ ns.last }}\n"
        "{{ m.content.strip().split('?')[0] }}{% if not loop.last %}{{ '\\n' }}{% endif %}\n{%- endfor %}\n"
    ),
    "alternate": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{% continue %}{% endif %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 1) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% generation %}{{ ' [' ~ message['content'] ~ '] ' }}{% endgeneration %}{% endfor %}"
    ),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{% if tools %}{{ tools | length }}{% endif %}",
    "format": "{{ '%s-%03d' | format('a', 5) }}{{ '{:>4}'.format('x') }}{{ 'ab' * 3 }}{{ '%d%%' % 7 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_transformers_renders_them(name, prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = utils.render_jinja_template(
        [TALK], chat_template=TEMPLATES[name], add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}).render(TALK, prompt)
    assert ours == theirs[0]


def test_json_is_not_escaped_for_html():
    text = ChatTemplate("{{ messages[0].content | tojson }}").render(TALK)
    assert text == '"Be <brief> & kind."'
    assert ChatTemplate("{{ messages[1].content | tojson }}").render(TALK) == '"Grüße, what\'s 1 < 2?"'


def test_the_clock_is_handed_in():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render(TALK) == "26 Jul 2024"


def test_further_variables_reach_the_template():
    template = ChatTemplate("{% if enable_thinking %}think{% endif %}{{ tools[0].name }}")
    assert template.render(TALK, variables={"enable_thinking": True, "tools": [{"name": "f"}]}) == "thinkf"
    with pytest.raises(ChatTemplateError, match="holds a object"):
        template.render(TALK, variables={"tools": [object()]})
    # Nothing a caller adds replaces the conversation.
    assert ChatTemplate("{{ messages | length }}").render(TALK, variables={"messages": []}) == "4"


def test_a_template_may_refuse_and_says_why():
    with pytest.raises(ChatTemplateError, match="refuses these messages: Conversation roles must alternate"):
        ChatTemplate(TEMPLATES["alternate"]).render([TALK[1], TALK[1]])


def test_faults_of_a_template_are_one_line_and_no_crash():
    for source in (
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages | nosuch }}",
        "{{ messages + 1 }}",
    ):
        with pytest.raises(ChatTemplateError) as caught:
            ChatTemplate(source).render(TALK)
        assert "\n" not in str(caught.value)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ('{0.__class__}').format('x') }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_leaves_the_sandbox(source):
    try:
        text = ChatTemplate(source).render(TALK)
    except ChatTemplateError:
        return
    assert text == "", f"{source} gave {text!r}"


LARGE = [
    "{% for i in range(100000000) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{{ messages[0].role }}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 1000000000 }}",
    "{{ [0] * 1000000000 }}",
    "{{ 1000000000 * 'x' }}",
    "{{ 10 ** 1000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x' | center(1000000000) }}",
    "{% set ns = namespace(s='x' * 1000) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]


@pytest.mark.parametrize("source", LARGE)
def test_work_and_output_are_bounded(source):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(TALK)


def test_output_is_cut_off_while_it_is_made(monkeypatch):
    monkeypatch.setattr(limits, "MAX_OUTPUT_CHARACTERS", 1000)
    template = ChatTemplate("{% for i in range(200) %}{{ messages[0].content }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="more than the 1000 characters"):
        template.render(TALK)


def test_the_count_of_operations_starts_anew_each_time(monkeypatch):
    monkeypatch.setattr(limits, "MAX_OPERATIONS", 60)
    template = ChatTemplate(TEMPLATES["headers"], {"bos_token": "<s>"})
    for _ in range(5):
        template.render(TALK)


def test_threads_count_apart(monkeypatch):
    monkeypatch.setattr(limits, "MAX_OPERATIONS", 60)
    template = ChatTemplate(TEMPLATES["headers"], {"bos_token": "<s>"})
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.extend(template.render(TALK) for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 200
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "1 to 4096 messages, not 0"),
        ([TALK[0]] * 4097, "1 to 4096 messages, not 4097"),
        ("hello", "must be a list"),
        (["hello"], r"messages\[0\] must be a mapping"),
        ([TALK[0], {"content": "x"}], r"messages\[1\] has no role; give one such as"),
        ([{"role": "user"}], "has no content"),
        ([{"role": 3, "content": "x"}], "has no role"),
        ([{"role": "user", "content": object()}], "holds a object, not text"),
        ([{"role": "user", "content": "x" * (1 << 23)}], "more than the 8388608 characters"),
        ([{"role": "user", "content": "x", 5: 6}], "key that is not text"),
    ],
)
def test_messages_are_checked_first(messages, match):
    with pytest.raises(ChatTemplateError, match=match):
        ChatTemplate("{{ messages }}").render(messages)


def test_deep_messages_are_refused():
    content: list = []
    for _ in range(50):
        content = [content]
    with pytest.raises(ChatTemplateError, match="nested deeper than 16"):
        ChatTemplate("x").render([{"role": "user", "content": content}])


def test_large_and_broken_templates_are_refused():
    with pytest.raises(ChatTemplateError, match="more than the 262144 allowed"):
        ChatTemplate("x" * 300_000)
    for source in ("{% for x in %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"):
        with pytest.raises(ChatTemplateError, match="does not parse"):
            ChatTemplate(source)


def test_the_messages_given_are_not_touched():
    message = {"role": "user", "content": ["a"]}
    ChatTemplate("{% set x = messages[0].content %}{{ x }}").render([message])
    assert message == {"role": "user", "content": ["a"]}
