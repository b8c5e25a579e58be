"""Key/value cache for generation, and the mask that goes with it.

Shapes: B batch, K key/value heads, C channels of a head, T new tokens, S all tokens (those in the cache and the new).
"""

import torch

from .LMConfig import LMConfig


class KVCache:
    """Keys and values of the tokens so far, in memory reserved once: (layers, B, K, capacity, C) each.

    Growing by concatenation would copy everything at every token. Hugging Face's caches work with the model as well,
    and this one with `generate`.
    """

    is_compileable = False  # asked by `generate`: lengths are Python numbers here

    def __init__(
        self,
        config: LMConfig,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.lengths = [0] * config.n_layers  # tokens held; layers differ only in the middle of a forward

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value (B, K, T, C) to a layer; return all it holds (B, K, S, C), as views.

        Raises:
            ValueError: more tokens than the capacity.
        """
        start = self.lengths[layer_idx]
        end = start + key.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"{end} tokens exceed the cache's capacity of {self.keys.shape[3]}: make a larger KVCache")
        self.keys[layer_idx, :, :, start:end] = key
        self.values[layer_idx, :, :, start:end] = value
        self.lengths[layer_idx] = end
        return self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held."""
        return self.lengths[layer_idx]

    def crop(self, length: int) -> None:
        """Keep what the slice [:length] keeps: crop(5) the first five tokens, crop(-2) all but the last two."""
        self.lengths = [len(range(held)[:length]) for held in self.lengths]

    def reset(self) -> None:
        """Forget everything; the memory stays reserved."""
        self.crop(0)


def causal_mask(
    attention_mask: torch.Tensor | None, past: int, T: int, device: torch.device
) -> torch.Tensor | None:  # (B or 1, 1, T, S), True where a query may look
    """Which of the S = past + T tokens each of the T new ones may see; None where causality alone says it.

    Aligned bottom-right: the last query sees everything, also when it is the end of a longer prompt fed in chunks. With
    2 tokens in the cache and 3 new ones (rows), x where row may look at column:

        x x x . .
        x x x x .
        x x x x x

    `attention_mask` (B, S) marks real tokens with 1 and padding with 0; a (B, 1, T, S) one is taken as it is.
    """
    if attention_mask is None and (past == 0 or T == 1):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    key = torch.arange(past + T, device=device)
    query = key[past:, None]
    if attention_mask is None:
        return (key <= query)[None, None]
    if attention_mask.shape[1] != past + T:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but the cache holds {past} and {T} are new: "
            f"pass a mask over all {past + T}"
        )
    # A padding query sees at least itself: a softmax over nothing is NaN.
    return (key <= query) & attention_mask[:, None, None, :].bool() | (key == query)
