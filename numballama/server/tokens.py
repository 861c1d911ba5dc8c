"""/tokenize, /detokenize and /apply-template: text, ids, and conversations as the model sees them."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..errors import Error
from .call import Call
from .chat_core import apply_template
from .errors import ApiError, refused
from .http import JsonResponse, json_parts
from .logprobs import token_bytes, token_text
from .protocol import DetokenizeRequest, TemplateRequest, TokenizeRequest


async def tokenize(call: Call, request: TokenizeRequest) -> Response:
    """Token ids of a text or a conversation. Raises `ApiError` 400 unless there is one of them."""
    given = [name for name in ("content", "prompt", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ApiError(f"one of content, prompt and messages is needed, found {found}", param="content")
    return Response(await call.run(_tokenize, call, request), media_type=JsonResponse.media_type)


def _tokenize(call: Call, request: TokenizeRequest) -> bytes:
    """The answer, in JSON: it may be much larger than the request."""
    service, tokenizer = call.service, call.service.tokenizer
    if request.messages is not None:
        ids = apply_template(service, request, request.messages, request.tools)
    else:
        # llama.cpp's requests bring no BOS unless they ask for it, vLLM's do
        text, bos = (request.content, False) if request.prompt is None else (request.prompt, True)
        for wish in (request.add_special, request.add_special_tokens):
            bos = bos if wish is None else wish
        try:
            ids = tokenizer.encode(text or "", bos=bos, special=bool(request.parse_special))
        except Error as error:
            raise refused(error, "content" if request.prompt is None else "prompt") from None
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.model.context}
    if request.return_token_strs:
        answer["token_strs"] = [tokenizer.piece(token) for token in ids]
    if request.with_pieces:
        answer["tokens"] = [{"id": token, "piece": _piece(call, token)} for token in ids]
    return b"".join(json_parts(answer))


def _piece(call: Call, token: int) -> str | list[int]:
    """A token's text, or its bytes where they are no whole characters: llama.cpp's way."""
    tokenizer = call.service.tokenizer
    data = bytes(token_bytes(tokenizer, token))
    try:
        return data.decode() or token_text(tokenizer, token)
    except UnicodeDecodeError:
        return list(data)


async def detokenize(call: Call, request: DetokenizeRequest) -> Response:
    """The text of token ids. `content` is llama.cpp's name for it, `prompt` vLLM's."""
    service = call.service
    try:
        text = await call.run(service.tokenizer.decode, request.tokens)
    except Error as error:
        raise refused(error, "tokens") from None
    return JsonResponse({"content": text, "prompt": text})


async def apply_chat_template(call: Call, request: TemplateRequest) -> Response:
    """A conversation as text."""
    text = await call.run(_render, call, request)
    return JsonResponse({"prompt": text})


def _render(call: Call, request: TemplateRequest) -> str:
    return apply_template(call.service, request, request.messages, request.tools, tokenize=False)
