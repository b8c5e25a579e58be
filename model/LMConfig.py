"""Every hyper-parameter of the network, checked once at construction, and the published sizes."""

import inspect
import math
import sys

from transformers import PreTrainedConfig

ROPE_SCALING_TYPES = ("linear", "ntk", "yarn")
LARGEST = 2**31 - 1  # of any whole number
YARN_KEYS = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")

# Keyword arguments that build the published models: LMConfig(**PUBLISHED["MiniMind2-Small"]).
_V1 = {"n_heads": 16, "n_kv_heads": 8, "rope_theta": 1e4, "max_seq_len": 512}
_V3 = {
    **{"dim": 768, "n_layers": 8, "n_kv_heads": 4, "hidden_dim": 2432},
    **{"qk_norm": True, "norm_eps": 1e-6, "max_seq_len": 32768},
}
PUBLISHED = {
    "MiniMind2-Small": {"dim": 512, "n_layers": 8},
    "MiniMind2": {"dim": 768, "n_layers": 16},
    "MiniMind2-MoE": {"dim": 640, "n_layers": 8, "use_moe": True},
    "minimind-v1-small": {"dim": 512, "n_layers": 8, **_V1},
    "minimind-v1": {"dim": 768, "n_layers": 16, **_V1},
    "minimind-v1-moe": {"dim": 512, "n_layers": 8, "use_moe": True, **_V1},
    "minimind-3": _V3,
    # One expert of four per token and none that is always on. Its normalised weight is 1: the router learns from the
    # balance loss alone, which is over the whole batch.
    "minimind-3-moe": {
        **_V3,
        **{"use_moe": True, "num_experts_per_tok": 1, "n_shared_experts": False},
        **{"seq_aux": False, "aux_loss_alpha": 5e-4},
    },
}


class LMConfig(PreTrainedConfig):
    """Hyper-parameters of MiniMind; also answers to the Hugging Face names (`hidden_size`, `num_hidden_layers`, ...).

    Args:
        dim: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads; each has dim / n_heads channels.
        n_kv_heads: key/value heads, shared by n_heads / n_kv_heads query heads each (GQA, arXiv 2305.13245).
        vocab_size: entries of the tokenizer; at most 65,536, because the token cache stores ids in 16 bits.
        hidden_dim: width of the feed-forward layer (of one expert in a MoE); None means 8/3 dim, rounded up to
            `multiple_of`. The number used is `config.intermediate_size`; the field itself is never overwritten.
        multiple_of: see hidden_dim.
        norm_eps: added to the mean square inside RMSNorm.
        max_seq_len: longest sequence the model is meant for, in tokens.
        rope_theta: base of the rotary wavelengths (RoPE, arXiv 2104.09864).
        rope_scaling: longer contexts without training: {"rope_type": "linear" | "ntk" | "yarn", "factor": 4.0}; for
            yarn also "original_max_position_embeddings" (default max_seq_len), "beta_fast" (32), "beta_slow" (1),
            "attention_factor" (0.1 ln(factor) + 1, the paper's). Nothing else; all as transformers computes them.
        dropout: probability, on the embedding, the attention weights and both residual branches.
        flash_attn: True runs PyTorch's fused attention; False runs the textbook formula, written out in model.py, as
            does attn_implementation="eager", transformers' word for it.
        qk_norm: RMSNorm on every query and key head (as Qwen3 does).
        use_moe: mixture of experts (moe.py) instead of one feed-forward layer in each block.
        num_experts_per_tok: routed experts that each token visits.
        n_routed_experts: routed experts to choose from.
        n_shared_experts: whether each token also visits one expert that is always on.
        scoring_func: only "softmax".
        aux_loss_alpha: weight of the load-balance loss of each layer. That loss is 1 when all experts are equally
            loaded and is summed over layers: upstream's 0.1 adds about 0.8 to the loss of an 8-layer model and rules
            its early gradients. Pass 0.1 to get that back.
        seq_aux: balance the experts within each sequence (True) or over the whole batch (False).
        norm_topk_prob: weights of the chosen experts sum to one.
        use_cache: whether inference returns a key/value cache unless told otherwise.

    Raises:
        ValueError: with every problem found, each naming the value, the limit and the remedy.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "rms_norm_eps": "norm_eps",
        "max_position_embeddings": "max_seq_len",
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
    }
    rope_scaling = None  # a plain attribute; the base class has a property of this name that rewrites the value

    def __init__(
        self,
        dim: int = 512,
        n_layers: int = 8,
        n_heads: int = 8,
        n_kv_heads: int | None = 2,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float = 1e-5,
        max_seq_len: int = 8192,
        rope_theta: float = 1e6,
        rope_scaling: dict | None = None,
        dropout: float = 0.0,
        flash_attn: bool = True,
        qk_norm: bool = False,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: bool = True,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.01,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        use_cache: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        # A Hugging Face name passed as a keyword means the field that it maps to.
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        aliases = {**self.attribute_map, "intermediate_size": "hidden_dim"}
        own |= {aliases[name]: kwargs.pop(name) for name in list(kwargs) if name in aliases}
        if "rope_parameters" in kwargs:
            raise ValueError("LMConfig: rope_parameters is not read: pass rope_theta and rope_scaling")
        if own["n_kv_heads"] is None:
            own["n_kv_heads"] = own["n_heads"]
        for name, value in own.items():
            setattr(self, name, value)
        if problems := self.problems():
            raise ValueError("LMConfig: " + "; ".join(problems))
        # Which of a folder's files is whose code (own_code.py); trl asks for it even where there is none.
        super().__init__(**{"auto_map": {}, **kwargs})

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.n_heads

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward layer: `hidden_dim` if given, else 8/3 dim rounded up to `multiple_of`."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return self.multiple_of * -(-int(8 * self.dim / 3) // self.multiple_of)

    def problems(self) -> list[str]:
        """What is impossible about these values; empty when the network can be built."""
        whole = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
        whole += ("num_experts_per_tok", "n_routed_experts") if self.use_moe else ()
        whole += ("hidden_dim",) if self.hidden_dim is not None else ()
        found = [
            f"{name}={_short(value)} must be a whole number from 1 to {LARGEST}"
            for name in whole
            if not _is_whole(value := getattr(self, name)) or not 1 <= value <= LARGEST
        ]
        for name in ("use_moe", "qk_norm", "flash_attn", "seq_aux", "norm_topk_prob"):
            if not isinstance(value := getattr(self, name), bool):
                found.append(f"{name}={_short(value)} must be True or False")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if not _is_whole(value := getattr(self, name)) or not 0 <= value <= LARGEST:
                found.append(f"{name}={_short(value)} must be the number of a token")
        if found:
            return found  # the checks below divide by these numbers
        if self.dim % self.n_heads:
            found.append(f"dim={self.dim} must be divisible by n_heads={self.n_heads}: change one")
        elif self.head_dim % 2:
            found.append(f"dim/n_heads={self.head_dim} must be even, rotary embedding turns pairs: change n_heads")
        if self.n_heads % self.n_kv_heads:
            found.append(f"n_heads={self.n_heads} must be divisible by n_kv_heads={self.n_kv_heads}: change one")
        if self.vocab_size > 65536:
            found.append(f"vocab_size={self.vocab_size} exceeds 65536, ids are stored in 16 bits: use a smaller one")
        if not (_is_finite(self.dropout) and 0 <= self.dropout < 1):
            found.append(f"dropout={_short(self.dropout)} must be at least 0 and below 1")
        for name in ("norm_eps", "rope_theta"):
            if not (_is_finite(value := getattr(self, name)) and value > 0):
                found.append(f"{name}={_short(value)} must be a number greater than 0")
        found += self._moe_problems() if self.use_moe else []
        found += self._rope_scaling_problems() if self.rope_scaling is not None else []
        return found

    def _moe_problems(self) -> list[str]:
        found = []
        if self.num_experts_per_tok > self.n_routed_experts:
            found.append(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds n_routed_experts={self.n_routed_experts}: "
                "lower the first or raise the second"
            )
        if self.scoring_func != "softmax":
            found.append(f"scoring_func={self.scoring_func!r} is unknown: use 'softmax'")
        if not (_is_finite(self.aux_loss_alpha) and self.aux_loss_alpha >= 0):
            found.append(f"aux_loss_alpha={_short(self.aux_loss_alpha)} must be a number of at least 0")
        if self.dim % 8 or self.intermediate_size % 8:
            found.append(
                f"dim={self.dim} and hidden_dim={self.intermediate_size} must be multiples of 8 in a mixture of "
                "experts: the grouped matrix product needs rows of 16 bytes"
            )
        if self.n_shared_experts not in (0, 1):  # True and False are 1 and 0
            found.append(f"n_shared_experts={self.n_shared_experts} must be True or False")
        return found

    def _rope_scaling_problems(self) -> list[str]:
        scaling = self.rope_scaling
        if not isinstance(scaling, dict):
            return [f'rope_scaling={_short(scaling)} must be a table like {{"rope_type": "yarn", "factor": 4.0}}']
        kinds = [scaling[name] for name in ("rope_type", "type") if name in scaling]
        if not kinds or kinds[0] not in ROPE_SCALING_TYPES or kinds[0] != kinds[-1]:
            named = " and ".join(map(repr, kinds)) or "None"
            return [f"rope_scaling type {named} is unknown: use one of {', '.join(ROPE_SCALING_TYPES)}"]
        kind, found = kinds[0], []
        if not (_is_finite(factor := scaling.get("factor")) and factor >= 1):
            found.append(f"rope_scaling factor {_short(factor)} must be a number of at least 1")
        known = {"rope_type", "type", "factor", *(YARN_KEYS if kind == "yarn" else ())}
        if unknown := sorted(scaling.keys() - known):
            found.append(f"rope_scaling: {kind} has no {', '.join(unknown)}, only {', '.join(sorted(known))}")
        for name in YARN_KEYS:
            if name in scaling and not (_is_finite(value := scaling[name]) and value > 0):
                found.append(f"rope_scaling {name} {_short(value)} must be a number greater than 0")
        if not found and not scaling.get("beta_fast", 32) > scaling.get("beta_slow", 1):
            found.append(
                "rope_scaling beta_fast must be greater than beta_slow: these are turns in the trained context"
            )
        if kind == "ntk" and self.head_dim < 4:
            found.append(f"rope_scaling ntk needs dim/n_heads of at least 4, not {self.head_dim}")
        if kind == "yarn" and _is_finite(self.rope_theta) and self.rope_theta <= 1:
            found.append(f"rope_scaling yarn needs rope_theta above 1, not {self.rope_theta}")
        return found


def config_fields(config: LMConfig) -> dict[str, object]:
    """Every field, in the constructor's order: LMConfig(**config_fields(config)) is the same configuration."""
    names = [name for name in inspect.signature(LMConfig.__init__).parameters if name not in ("self", "kwargs")]
    return {name: getattr(config, name) for name in names}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """True for a number that a float can hold: files may hold whole numbers that are larger."""
    return (_is_whole(value) and abs(value) < sys.float_info.max) or (isinstance(value, float) and math.isfinite(value))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
