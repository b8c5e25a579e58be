"""Key/value cache for generation, and the masks that go with it.

Shapes: B batch, K key/value heads, C channels of a head, T new tokens, S tokens that are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

BLOCK = 64  # tokens: a cache's capacity, and how much of it is read, are multiples of it


class KVCache:
    """Keys and values of the tokens so far, in memory reserved in advance: (layers, rows, K, capacity, C) each.

    Growing by concatenation would copy everything at every token. Every row is a text of its own with a length of its
    own: the network is given a `Window` to continue some of them. Given the cache itself, as Hugging Face's are given
    and as `model.generate(past_key_values=...)` does, it continues all rows together.

    Raises:
        ValueError: a model that needs more than the keys and values of all its tokens (see `cache_shape`).
    """

    is_compileable = False  # asked by `generate`: lengths are Python numbers here

    def __init__(
        self,
        config: PreTrainedConfig,
        rows: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        layers, K, C = cache_shape(config)
        # Zeros: what lies behind a row's end gets weight 0 in attention, and 0 * NaN would be NaN.
        self.keys = torch.zeros(layers, rows, K, capacity, C, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * rows  # tokens of each row

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.keys.shape[3]

    # Row by row, as the engine uses it

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a row: doubled when it must grow, so that each token is moved at most twice."""
        if length > self.capacity:
            capacity = max(in_blocks(length), 2 * self.capacity)
            shape = (*self.keys.shape[:3], capacity, self.keys.shape[4])
            for name in ("keys", "values"):
                old = getattr(self, name)
                grown = old.new_zeros(shape)
                grown[:, :, :, : old.shape[3]] = old
                setattr(self, name, grown)

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        longest = max(self.lengths[a], self.lengths[b])
        for held in (self.keys, self.values):
            of_a = held[:, a, :, :longest].clone()
            held[:, a, :, :longest] = held[:, b, :, :longest]
            held[:, b, :, :longest] = of_a
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` tokens of row `source`."""
        for held in (self.keys, self.values):
            held[:, target, :, :length] = held[:, source, :, :length]
        self.lengths[target] = length

    def clear(self, row: int) -> None:
        """Forget a row and write zeros over it: for one that may hold NaN."""
        self.keys[:, row], self.values[:, row], self.lengths[row] = 0, 0, 0

    # All rows together, as the network itself and transformers use it

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append key and value (B, K, T, C) to a layer of all rows; return all it holds (B, K, S, C), as views.

        Raises:
            ValueError: more tokens than the capacity.
        """
        start = self.get_seq_length()
        end = start + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens exceed the cache's capacity of {self.capacity}: make a larger KVCache")
        self.keys[layer_idx, :, :, start:end] = key
        self.values[layer_idx, :, :, start:end] = value
        if layer_idx == len(self.keys) - 1:  # the last layer: this forward is over
            self.lengths = [end] * len(self.lengths)
        return self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by every row; they are equally many unless rows were continued through windows."""
        return self.lengths[0]

    def crop(self, length: int) -> None:
        """Keep what the slice [:length] keeps: crop(5) the first five tokens, crop(-2) all but the last two."""
        self.lengths = [len(range(held)[:length]) for held in self.lengths]

    def reset(self) -> None:
        """Forget everything; the memory stays reserved."""
        self.crop(0)


class Window:
    """Some rows of a KVCache during one forward pass; the network takes it for its `past_key_values`.

    Two rows that hold 2 and 4 tokens get one more each, and 8 columns are read. x is what `mask` lets through:

        row 0   x x x . . . . .     positions 2     its new token goes to column 2
        row 1   x x x x x . . .               4                          column 4

    Args:
        rows: which rows, as a slice or as indices (B,); indices make a copy of all that is read.
        positions: (B, T) the columns of the new tokens, which are also their rotary positions.
        read: S, how many columns are looked at; at least the last position + 1.
    """

    def __init__(self, cache: KVCache, rows: slice | Tensor, positions: Tensor, read: int):
        self.cache, self.rows, self.positions, self.read = cache, rows, positions, read
        columns = torch.arange(read, device=positions.device)
        self.mask = (columns <= positions[..., None])[:, None]  # (B, 1, T, S)
        self.place = self._place()

    def _place(self) -> tuple[slice | Tensor, slice, slice | Tensor]:
        """Where the new tokens go, as indices into a layer (rows, K, capacity, C)."""
        if isinstance(self.rows, slice) and self.rows.stop - self.rows.start == 1:  # plain slices are twice as fast
            start = self.cache.lengths[self.rows.start]
            return self.rows, slice(None), slice(start, start + self.positions.shape[1])
        indices = self.rows
        if isinstance(self.rows, slice):
            indices = torch.arange(self.rows.start, self.rows.stop, device=self.positions.device)
        return indices[:, None], slice(None), self.positions

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_) -> tuple[Tensor, Tensor]:
        """Write key and value (B, K, T, C) at their columns; return all that is looked at, (B, K, S, C)."""
        read = []
        is_sliced = isinstance(self.place[2], slice)
        for held, new in ((self.cache.keys[layer_idx], key), (self.cache.values[layer_idx], value)):
            # Two index tensors with a slice between them want the indexed dimensions first: (B, T, K, C).
            held[self.place] = new if is_sliced else new.transpose(1, 2)
            read.append(held[self.rows, :, : self.read])
        return tuple(read)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """For models of transformers, which ask; positions and mask are given to them."""
        return self.read - self.positions.shape[1]


def in_blocks(length: int) -> int:
    """A length rounded up to a multiple of BLOCK."""
    return -(-length // BLOCK) * BLOCK


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, key/value heads and channels of a head, by Hugging Face's names for them.

    Raises:
        ValueError: the model needs more than the keys and values of all its tokens, e.g. a sliding window or a state.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    heads = getattr(config, "num_attention_heads", None)
    windowed = getattr(config, "sliding_window", None) is not None
    if not isinstance(heads, int) or kinds != {"full_attention"} or windowed or config.is_encoder_decoder:
        raise ValueError(
            f"models of type {config.model_type!r} cannot be continued here: only those whose every layer attends to "
            "all tokens before, as MiniMind, Llama and Qwen3 do; use `generate` of transformers for this one"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim


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
