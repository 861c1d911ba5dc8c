"""What transformers and llama.cpp make of chat templates, into templates.json beside this file.

    python make_templates.py transformers FOLDER    FOLDER/tokenizer-NAME of real tokenizers; and the templates below
    python make_templates.py llama.cpp              the templates that are built in here as well as there

Of real templates only the renderings are kept: their source is read from where the tokenizer is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDEN = HERE / "templates.json"
REAL = ("llama3_2", "qwen2_5", "qwen3")
VARIABLES = {"date_string": "26 Jul 2024"}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Größe?\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n 1 "},
        {"role": "user", "content": "two {{ x }} & <b> \"quoted\" 'q' \\ 🙂"},
    ],
    [
        {"role": "system", "content": " \nSystem {% if %} "},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "line\nline"},
        {"role": "user", "content": "a\n\n\nb"},
        {"role": "assistant", "content": "last"},
    ],
]

OWN = {
    "blocks": """{% for m in messages %}
    {% if m.role == 'system' %}
  [{{ m.content }}]
    {% else %}
  {{- m['role'] }}: {{ m['content'] | trim }}
{# a comment #}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %} -> {% endif %}
""",
    "loops": "{% for m in messages %}"
    "{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}"
    "{% endif %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem is defined }}"
    "{{ m.content | length }};{% else %}none{% endfor %}{{ range(3) | list }}{{ [1, 2] + [3] }}{{ (1, 'a') }}",
    "json": "{{ messages | tojson }}"
    "{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': none} | tojson(sort_keys=true) }}"
    "{{ '<é>&' | tojson }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ bos_token + m.content }}{% endif %}{% endfor %}",
    "macros": "{% macro turn(m, end='.') %}{{ m.role | upper }}={{ m.content | replace('\\n', '|') }}{{ end }}"
    "{{ caller() if caller }}{% endmacro %}{% set ns = namespace(n=0, s='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ ns.n ~ m.role[:2] %}{{ turn(m, end=ns.n) }}{% endfor %}"
    "{% call turn(messages[0]) %}called{% endcall %}{{ ns.s }}{% set block %}  kept {{ ns.n }}{% endset %}{{ block }}"
    "{{ undefined_thing }}{{ messages[0].nothing is defined }}",
    "filters": "{{ messages | map(attribute='role') | join('+') }}{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ 'a b c'.split(' ') | reverse | join }}{{ 'x,y'.split(',')[-1] }}{{ 3.7 | int }}{{ '7' | int + 1 }}{{ 7 // 2 }}"
    "{{ 2 ** 5 }}{{ 7 % 4 }}{{ '%s-%d' % ('a', 3) }}{{ '{}:{}'.format(1, 'z') }}{{ [3, 1, 2] | sort }}"
    "{{ {'k': 1}.items() | list }}{{ none }}{{ true }}{{ 'abc'[::-1] }}{{ 'A' if messages else 'B' }}{{ 'x' * 3 }}"
    "{{ messages[-1]['content'].strip().startswith('a') }}{{ 'q' in messages[0].content }}{{ 'text' | capitalize }}"
    "{{ dict(a=1, b='x') }}{{ [[1, 2], [3]] | sum(start=[]) if false else 0 }}{{ [1, 2.5] | sum }}"
    "{{ messages | sum(attribute='size') if false else '' }}{{ 'l1\\nl2' | indent(2) }}{{ [1, 1, 2] | unique | list }}",
}

VARIABLES_TEMPLATE = (
    "{{ bos_token }}{{ eos_token }}[{{ pad_token }}{{ unk_token }}]{{ pad_token is defined }}{{ sep_token is defined }}"
    "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ add_generation_prompt }}{{ enable_thinking }}"
    "{% for m in messages %}{{ m.keys() | list }}{{ m.reasoning_content }}{{ m.thinking }}{{ m.content is defined }}"
    "{% endfor %}{{ dict(a=1).a }}{{ namespace(x=2).x }}{{ tools }}{{ documents | tojson }}{{ extra }}"
)
"""What transformers passes to a template besides messages."""
TOKENS = {"pad_token": "[PAD]", "unk_token": "<unk>"}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "three", "name": None},
    {"role": "assistant", "content": None, "reasoning": "so", "tool_calls": [{"function": {"name": "f"}}]},
]
CASES: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tools_in_user_message": False},
    {"documents": [{"title": "t", "text": "x"}], "extra": (1, "a"), "bos_token": "<B>"},
    {"extra": {"a": [1.5, None, True]}, "pad_token": None},
]

CONTINUED_TEMPLATES = {
    "keeps": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trims": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} </s>\n{% endfor %}",
    "drops the last": "{% for m in messages[:-1] %}{{ m.content }};{% endfor %}end",
    "drops thoughts": "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] | trim }}#{% endfor %}",
    "repeats": "{% for m in messages %}{{ m.content }}|{{ m.content }}|{% endfor %}{{ messages[-1].content[:3] }}",
    "upper case": "{% for m in messages %}{{ m.content | upper }}.{% endfor %}",
    "reasons": "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}",
    "thinks": "{% for m in messages %}<think>{{ m.thinking }}</think>{{ m.content }}</s>{% endfor %}",
    "blocks": "{% for m in messages %}{{ m.role }}:{% for b in m.content %}{% if b.type == 'text' %} {{ b.text }}"
    "{% else %} [image]{% endif %}{% endfor %}</s>{% endfor %}",
    "no messages": "{{ bos_token }}x{{ add_generation_prompt }}",
}
_ASK: dict[str, Any] = {"role": "user", "content": "Sum of 1 and 2?"}
CONTINUED: list[list[dict[str, Any]]] = [
    *([_ASK, {"role": "assistant", "content": text}] for text in (
        "It is", "It is ", "  It is\n\n", "", " ", "user", "Sum of 1 and 2?", "a</think> b", "<think>a</think>\n\nb ",
        "CONTINUE_FINAL_MESSAGE_TAG x", "größer 🙂 ",
    )),
    [_ASK],
    [],
    [_ASK, {"role": "assistant", "content": None}],
    [_ASK, {"role": "assistant", "content": "so", "reasoning_content": "hm "}],
    [_ASK, {"role": "assistant", "content": "so", "thinking": "hm"}],
    [_ASK, {"role": "assistant", "content": "", "reasoning": " hm\n"}],
    [{"role": "user", "content": [{"type": "text", "text": "What"}]},
     {"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}, {"type": "x"}]}],
    [{"role": "user", "content": [{"type": "image"}]}],
]  # fmt: skip
CONTINUED_KEYS = (True, "content", "reasoning_content", "thinking", "reasoning", "nothing")

BUILT_IN = {"ChatML": "chatml", "Llama 3's": "llama3"}
"""Not Llama 2's: llama.cpp leaves out spaces that Meta's own code writes. Nor does it write BOS."""


def write(name: str, content: dict[str, Any]) -> None:
    found: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    found[name] = content
    GOLDEN.write_text(json.dumps(dict(sorted(found.items())), indent=0, ensure_ascii=False) + "\n")


def transformers(folder: Path) -> None:
    import transformers as library

    def renderings(tokenizer: Any, template: str | None) -> dict[str, Any]:
        def apply(tokenize: bool) -> list[Any]:
            options = {"chat_template": template, "tokenize": tokenize, "return_dict": False} | VARIABLES
            return [
                tokenizer.apply_chat_template(conversation, add_generation_prompt=prompt, **options)
                for conversation in CONVERSATIONS
                for prompt in (False, True)
            ]

        found = {"peer": f"transformers {library.__version__}", "renderings": apply(False)}
        return found if template else found | {"ids": apply(True)}

    for name in REAL if folder.exists() else ():
        write(name, renderings(library.AutoTokenizer.from_pretrained(folder / f"tokenizer-{name}"), None))
    json_file, ends = str(HERE / "small.json"), {"bos_token": "<s>", "eos_token": "</s>"}
    small = library.PreTrainedTokenizerFast(tokenizer_file=json_file, **ends)
    for name, template in OWN.items():
        write(f"own {name}", renderings(small, template))
    small = library.PreTrainedTokenizerFast(tokenizer_file=json_file, **ends, **TOKENS)
    options: dict[str, Any] = {"chat_template": VARIABLES_TEMPLATE, "tokenize": False}
    found = [small.apply_chat_template(TALK, **options, **case) for case in CASES]
    write("variables", {"peer": f"transformers {library.__version__}", "renderings": found})

    def continued(template: str, talk: list[dict[str, Any]], key: bool | str) -> str | None:
        try:
            text: str = small.apply_chat_template(
                json.loads(json.dumps(talk)), chat_template=template, tokenize=False, continue_final_message=key
            )
        except Exception:  # whatever it raises where it refuses, or fails
            return None
        return text

    found = [
        continued(template, talk, key)
        for template in CONTINUED_TEMPLATES.values() for talk in CONTINUED for key in CONTINUED_KEYS
    ]  # fmt: skip
    write("continued", {"peer": f"transformers {library.__version__}", "renderings": found})


def llama_cpp(_: Path) -> None:
    import llama_cpp as lc

    for name, theirs in BUILT_IN.items():
        out = []
        for conversation in CONVERSATIONS:
            for prompt in (False, True):
                messages = (lc.llama_chat_message * len(conversation))()
                for message, given in zip(messages, conversation, strict=True):
                    message.role, message.content = given["role"].encode(), given["content"].encode()
                room = bytes(10_000)
                count = lc.llama_chat_apply_template(theirs.encode(), messages, len(messages), prompt, room, len(room))
                assert count >= 0, theirs
                out.append(room[:count].decode())
        write(f"built-in {name}", {"peer": f"llama.cpp {theirs!r} ({lc.__version__})", "renderings": out})


if __name__ == "__main__":
    {"transformers": transformers, "llama.cpp": llama_cpp}[sys.argv[1]](Path(*sys.argv[2:]))
