"""llama.cpp's server on a GGUF file, inside this process (package xllamacpp)."""

import json
import urllib.request
from pathlib import Path


class LlamaCpp:
    """One model, one conversation at a time, so set that only the weights are rounded.

    The key/value cache is in float32, and flash attention off: on a CPU it rounds queries to float16, which moved
    log-probabilities of a float32 model by 0.006 (now 0.00001).
    """

    def __init__(self, path: Path, context: int, threads: int = 1):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = False
        self.server = xllamacpp.Server(params)
        (about,) = self.post("/v1/models")["data"]
        self.vocab_size = about["meta"]["n_vocab"]

    def post(self, endpoint: str, **fields):
        """What an endpoint of the server answers (tools/server/README.md of llama.cpp); without fields, to a GET."""
        content = json.dumps(fields).encode() if fields else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + endpoint, content, headers)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids; control tokens such as <s> are ordinary text unless `parse_special`."""
        return self.post("/tokenize", content=text, add_special=False, parse_special=parse_special)["tokens"]

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The most probable tokens; `</s>`, which the server leaves out then, is none of them."""
        return self.post(
            "/completion",
            prompt=prompt,
            n_predict=new_tokens,
            temperature=0,
            ignore_eos=True,
            cache_prompt=False,
            return_tokens=True,
        )["tokens"]

    def logprob(self, prompt: list[int], token: int) -> float:
        """Log-probability (nats) of one token behind a prompt; the next call may go on where this one ended.

        The server gives log-probabilities as they were before anything was added to the logits, but only of the token
        that it takes: a bias makes it take this one. Of `</s>` and of parts of a character it tells nothing: then it
        takes another, and tells the whole vocabulary, in ten times the time.
        """
        if taken := self._take(prompt, token, n_probs=1):
            return taken["logprob"]
        taken = self._take(prompt, self.tokenize("a")[0], n_probs=self.vocab_size)
        return next(entry["logprob"] for entry in taken["top_logprobs"] if entry["id"] == token)

    def _take(self, prompt: list[int], token: int, n_probs: int) -> dict | None:
        answer = self.post(
            "/completion",
            prompt=prompt,
            n_predict=1,
            temperature=0,
            logit_bias=[[token, 1e6]],
            n_probs=n_probs,
            cache_prompt=True,
        )
        taken = answer.get("completion_probabilities")
        if taken and taken[0]["id"] != token:
            raise RuntimeError(f"llama.cpp took token {taken[0]['id']}, not {token}")
        return taken[0] if taken else None
