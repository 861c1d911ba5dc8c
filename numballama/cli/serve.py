"""`numballama serve`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from functools import partial
from pathlib import Path

from .. import compile, progress
from ..errors import Error
from ..server.settings import Settings
from .args import (
    MODEL_HELP,
    MODEL_OPTIONS,
    STORY_MODEL,
    model_options,
    read_template,
    template_arguments,
    template_options,
    text_of_file,
)
from .parser import Parser
from .streams import say

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")
"""Modules of the extra `serve` that a server cannot do without."""
KEY_VARIABLE = "NUMBALLAMA_API_KEY"
MOST_SERVERS = 64
"""Most processes for HTTP."""
DEFAULTS = Settings()


def add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model with OpenAI's interface and a page to chat on",
        description="Serve a model over HTTP: OpenAI's and Anthropic's interfaces, for many clients at once.",
        epilog="It listens on 127.0.0.1 unless --host says otherwise. Ctrl-C and SIGTERM let running requests end.",
        examples=(
            "numballama serve model.gguf --max-sequences 16",
            "numballama serve model.gguf --host 0.0.0.0 --api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem",
        ),
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} ({STORY_MODEL})")
    group = serve.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port (default 8000); 0: a free one")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that requests must bring; may be repeated (also ${KEY_VARIABLE}, separated by commas)",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a file with a key on each line")
    group.add_argument("--model-name", metavar="NAME", help="what the model is called (default: its file's name)")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this server in addresses; may be repeated (default: names of this machine, or any with a key)",
    )
    group.add_argument("--tls-cert", metavar="FILE", help="certificate for https")
    group.add_argument("--tls-key", metavar="FILE", help="its private key")
    group.add_argument(
        "--api-server-count",
        type=int,
        default=1,
        metavar="N",
        help="processes for HTTP, templates and tokenising, beside the engine's (default 1: one process does all)",
    )
    group.add_argument("--log-json", action="store_true", help="log lines of JSON")
    group.add_argument("--log-prompts", action="store_true", help="log the bodies of requests")
    limits = serve.add_argument_group("limits")
    limits.add_argument(
        "--max-sequences", type=int, default=8, metavar="N", help="sequences that generate together (default 8)"
    )
    limits.add_argument(
        "--kv-tokens",
        type=int,
        metavar="N",
        help="KV cache of all sequences together, in tokens (default: --max-sequences times the context, less where "
        "memory is short)",
    )
    limits.add_argument(
        "--queue", type=int, metavar="N", help="sequences that may wait (default: 4 times --max-sequences)"
    )
    limits.add_argument(
        "--queue-tokens", type=int, metavar="N", help="prompt tokens that may wait (default: 4 times the KV cache)"
    )
    for option, default, text in (
        ("--request-timeout", DEFAULTS.request_timeout_s, "time for a request"),
        ("--stall-timeout", DEFAULTS.stall_s, "time without a step after which /health reports an error"),
        ("--drain-timeout", DEFAULTS.drain_s, "time for running requests after SIGTERM"),
    ):
        text += f", in seconds (default {default:g})"
        limits.add_argument(option, type=float, default=default, metavar="X", help=text)
    ray = serve.add_argument_group("several machines")
    ray.add_argument("--ray", action="store_true", help="serve by Ray: replicas of the model on a cluster's machines")
    ray.add_argument("--replicas", type=int, default=1, metavar="N", help="replicas of the model (default 1)")
    ray.add_argument(
        "--max-replicas", type=int, metavar="N", help="add replicas, up to N, while requests wait (default: --replicas)"
    )
    template_options(serve)
    model_options(serve)
    serve.set_defaults(run=run_serve)


def run_serve(arguments: argparse.Namespace) -> None:
    require_extra()
    from ..server.run import Address, serve

    settings = settings_of(arguments)
    address = Address(arguments.host, arguments.port, arguments.tls_cert, arguments.tls_key)
    options = {name: getattr(arguments, name) for name in (*MODEL_OPTIONS, "max_sequences", "kv_tokens")}
    show = progress.log.info if arguments.quiet else say
    if arguments.ray:
        from ..server import ray_app

        own = {name: options.pop(name) for name in ("device", "threads", "max_sequences")}
        own |= {name: getattr(arguments, name) for name in ("model", "replicas", "max_replicas", "log_json")}
        ray_app.run({**own, "arguments": options}, settings, address, show)
        return
    load = partial(compile, arguments.model, **options)
    if arguments.api_server_count > 1:
        from ..server.processes import serve_by_processes

        serve_by_processes(load, settings, address, arguments.api_server_count, log_json=arguments.log_json, show=show)
    else:
        serve(load, settings, address, log_json=arguments.log_json, show=show)


def require_extra() -> None:
    """Raise `Error` when a library of the extra `serve` is missing."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Error(f'the server needs {name} ({error}): pip install "numballama[serve]"') from None


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the options ask for. Raises `Error` for one out of range, or a file that cannot be read."""
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise Error("--tls-cert and --tls-key go together: found one of them")
    if not 0 <= arguments.port <= 65535:
        raise Error(f"--port must be between 0 (a free one) and 65535, found {arguments.port}")
    if not arguments.ray and (arguments.replicas != 1 or arguments.max_replicas is not None):
        raise Error("--replicas and --max-replicas need --ray")
    if not 1 <= arguments.api_server_count <= MOST_SERVERS:
        raise Error(f"--api-server-count must be between 1 and {MOST_SERVERS}, found {arguments.api_server_count}")
    if arguments.ray and arguments.api_server_count > 1:
        raise Error("--api-server-count is for one machine: with --ray use --replicas")
    for name in ("queue", "queue_tokens", "request_timeout", "stall_timeout", "drain_timeout"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < math.inf:
            raise Error(f"--{name.replace('_', '-')} must be at least 0 and finite, found {value:g}")
    for file in (arguments.tls_cert, arguments.tls_key):
        if file is not None and not Path(file).is_file():
            raise Error(f"{file}: there is no such file")
    return Settings(
        model_name=arguments.model_name,
        api_keys=api_keys(arguments),
        allowed_hosts=tuple(name.lower() for name in arguments.allowed_host) or None,
        chat_template=read_template(arguments.chat_template),
        template_kwargs=template_arguments(arguments),
        queue_sequences=arguments.queue,
        queue_tokens=arguments.queue_tokens,
        request_timeout_s=arguments.request_timeout,
        stall_s=arguments.stall_timeout,
        drain_s=arguments.drain_timeout,
        log_prompts=arguments.log_prompts,
    )


def api_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Keys of the options, the file and the environment. Raises `Error` for a file that has none or is no text."""
    keys = [*arguments.api_key, *os.environ.get(KEY_VARIABLE, "").split(",")]
    if (file := arguments.api_key_file) is not None:
        lines = text_of_file(file).split()
        if not lines:
            raise Error(f"{file}: there is no key in this file")
        keys += lines
    if any(not key.strip() for key in arguments.api_key):
        raise Error("--api-key must not be empty")
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
