"""`Settings`: what the operator of a server decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How a server behaves. Times are in seconds, sizes in bytes."""

    model_name: str | None = None
    """The name that /v1/models and the answers give. None: the file's."""
    api_keys: tuple[str, ...] = ()
    """Every path but /health needs one of these. Empty: none is needed."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that a request's Host header may have, without the port. None: any. It stops a web page whose name was made
    to point to this machine."""
    chat_template: str | None = None
    """A template in jinja2, or the name of one of the model's. None: the model's own."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the template, such as enable_thinking. Those of a request come on top."""
    queue_sequences: int | None = None
    """Sequences that may wait besides those that run. More are refused with 429. None: 4 · max_sequences."""
    queue_tokens: int | None = None
    """Prompt tokens that may wait for their first answer. More are refused with 429. None: 4 times the KV cache."""
    max_body: int = 8 << 20
    """Bytes of a request's body."""
    max_logits: int = 2 << 30
    """Bytes of logits that log probabilities of a prompt may need."""
    body_timeout_s: float = 60
    """Time for a client to send the head of a request, and then for its body."""
    request_timeout_s: float = 3600
    """Time for a request, its waiting included."""
    keep_alive_s: float = 15
    """A stream that has sent nothing for so long sends a comment."""
    stall_s: float = 120
    """/health reports 503 when requests wait and no step of the engine has ended for so long."""
    drain_s: float = 30
    """After SIGTERM: time for running requests to end."""
    log_prompts: bool = False
    """Whether the log contains the bodies of requests."""
