"""POST /v1/embeddings: the mean of a text's last hidden states, for programs that ask for an embedding model, too.

A demonstration: the model was trained to continue text, not to tell whether two texts mean the same.
"""

from __future__ import annotations

import asyncio
import base64
import struct

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from inference.server.completions import prompts_of
from inference.server.errors import ApiError
from inference.server.protocol import EmbeddingRequest
from inference.server.service import Service


async def embeddings(http: HttpRequest, body: EmbeddingRequest) -> Response:
    """The endpoint. Raises ApiError."""
    service: Service = http.app.state.service
    if service.adapter_of(body.model) is not None:
        raise ApiError(400, "adapters give no embeddings here: use the model without one", param="model")
    dim = service.model.config.hidden_size
    if body.dimensions not in (None, dim):
        raise ApiError(400, f"dimensions is {body.dimensions}: this model has {dim}", param="dimensions")
    try:
        prompts = await run_in_threadpool(prompts_of, service, body.input)
    except ApiError as error:
        error.param = "input"
        raise
    for prompt in prompts:
        if len(prompt.ids) > service.context:
            message = f"a text of {len(prompt.ids)} tokens, the context has {service.context}: cut it"
            raise ApiError(400, message, param="input", code="context_length_exceeded")
    lock: asyncio.Lock = http.app.state.embedding_lock
    data = []
    for index, prompt in enumerate(prompts):
        async with lock:  # one at a time: the threads of the CPU belong to the engine
            vector = await run_in_threadpool(embed, service, prompt.ids)
        if body.encoding_format == "base64":  # little-endian float32, what OpenAI's client asks for by itself
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    n_tokens = sum(len(prompt.ids) for prompt in prompts)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    http.scope["record"].update(model=body.model, prompt_tokens=n_tokens)
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


@torch.inference_mode()
def embed(service: Service, ids: list[int]) -> list[float]:
    """The mean of the last hidden states of T tokens, of length 1: (D,)."""
    input_ids = torch.tensor([ids], device=service.model.device)
    hidden = service.model.base_model(input_ids, use_cache=False).last_hidden_state  # (1, T, D)
    return torch.nn.functional.normalize(hidden[0].float().mean(dim=0), dim=0).tolist()
