"""Names of tokens that end a generation, "EOG" in llama.cpp. A token with such a name is a control token, whatever flag
its file gives it: files that forget the flag are common. The list is that of llama.cpp in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

EOG_NAMES = frozenset(
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    ]
)
"""Ends of turns and texts, and the tokens between the files of a repository (from "<|fim_pad|>" on)."""


def eog_ids(special_tokens: Mapping[str, int], eos_id: int | None) -> frozenset[int]:
    """Ids of the control tokens that end a generation, EOS among them."""
    names = not_eog(special_tokens)
    found = {token for name, token in special_tokens.items() if name in EOG_NAMES and name not in names}
    return frozenset(found if eos_id is None else {*found, eos_id})


def not_eog(names: Iterable[str]) -> set[str]:
    """Names of `EOG_NAMES` that end nothing in a vocabulary with the tokens `names`, as in llama.cpp."""
    found, exceptions = set(names), set[str]()
    if {"<|return|>", "<|call|>"} <= found or ("<|flush|>" in found and found & {"<|call|>", "<|calls|>"}):
        exceptions.add("<|end|>")  # harmony: it ends a message, and others follow
    if found & {"<|tool_response>", "<|plamo:eos|>"}:
        exceptions.add("</s>")  # an HTML tag
    return exceptions
