"""Chat templates for model files without one, and the special tokens that tell which template fits."""

from __future__ import annotations

from typing import NamedTuple

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token }}{{ '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class BuiltinTemplate(NamedTuple):
    """A template and the special tokens that a vocabulary must have for it."""

    name: str
    source: str
    special_tokens: tuple[str, ...]


BUILTIN_TEMPLATES = (
    BuiltinTemplate("ChatML", CHATML, ("<|im_start|>", "<|im_end|>")),
    BuiltinTemplate("Llama 3's", LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    BuiltinTemplate("Llama 2's", LLAMA2, ("<s>", "</s>")),
)
"""Built-in templates. The first whose special tokens are in the vocabulary is used."""
