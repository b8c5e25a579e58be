"""The network, top to bottom: RMSNorm, attention, feed-forward, block, backbone, language-model head.

Shapes in comments: B batch, T tokens of this call, S tokens attended to (T and those in the cache), D dim, H query
heads, K key/value heads, C channels of a head, V vocabulary. Tensor names and the rotary layout are Hugging Face
Llama's (Qwen3's with `qk_norm`): a dense model here is a `LlamaForCausalLM` with the same state dict.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from .cache import causal_mask
from .LMConfig import LMConfig
from .moe import Experts, MoEFeedForward, Router, load_balance_loss
from .rotary import rotary_frequencies, rotate


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square (arXiv 1910.07467), in float32 whatever the input's type.

    In half precision the squares of values above 256 would overflow.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).type_as(x)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float, fused: bool
) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v (arXiv 1706.03762 eq. 1) for q (B, H, T, C) and k, v (B, K, S, C): (B, H, T, C)."""
    T, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    # "if": torch.compile with varying shapes would make `T > 1` a symbol, which the kernel below does not take.
    causal = True if mask is None and T > 1 else False
    if not fused:
        # Query heads share: with 8 of them and 2 for the keys, head h of the queries meets head h // 4 of the keys.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
        if causal:
            mask = torch.ones(T, S, device=q.device, dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.float().softmax(-1).type_as(q), dropout) @ v
    # Shared heads without copying them, where a fast kernel can: CUDA has one only in half precision without a mask.
    shared = q.device.type == "cpu" or (q.is_cuda and mask is None and q.dtype != torch.float32)
    if not shared:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=shared and groups > 1
    )


class Attention(nn.Module):
    """Causal self-attention whose query heads share fewer key/value heads (GQA, arXiv 2305.13245)."""

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.config, self.dropout = config, config.dropout
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj.into_residual = True  # starts smaller: see _init_weights
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, rotary: tuple, mask: torch.Tensor | None, past_key_values=None) -> torch.Tensor:
        B, T, D = x.shape
        # What each token looks for (q), what it can be found by (k), and what it then hands over (v).
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_heads, self.head_dim))  # (B, T, H, C)
        k = self.k_norm(self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim))  # (B, T, K, C)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, C)

        # Positions come in here, and only into q and k: their product then depends on the distance of two tokens.
        q = rotate(q, *rotary).transpose(1, 2)  # (B, H, T, C)
        k = rotate(k, *rotary).transpose(1, 2)  # (B, K, T, C)
        v = v.transpose(1, 2)

        # In generation T is 1 after the prompt; keys and values of the tokens before come from the cache.
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, K, S, C)
        dropout = self.dropout if self.training else 0.0
        fused = self.config.flash_attn and self.config._attn_implementation != "eager"
        y = attend(q, k, v, mask, dropout, fused)  # (B, H, T, C)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.dim, bias=False)
        self.down_proj.into_residual = True  # starts smaller: see _init_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        if config.use_moe:
            self.mlp = MoEFeedForward(config, FeedForward(config) if config.n_shared_experts else None)
        else:
            self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor, rotary: tuple, mask: torch.Tensor | None, past_key_values=None):
        """hidden (B, T, D) -> hidden (B, T, D) and, of a MoE, router logits (B, T, experts), else None."""
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), rotary, mask, past_key_values))
        y = self.mlp(self.post_attention_layernorm(hidden))
        router_logits = None
        if isinstance(self.mlp, MoEFeedForward):
            y, router_logits = y
        return hidden + self.dropout(y), router_logits


class MiniMindPreTrainedModel(PreTrainedModel):
    """What Hugging Face's tools ask of a model, and the initial weights."""

    config_class = LMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # "sdpa" or "eager", see Attention; transformers would look for its own table in this file

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); smaller where it matters.

        Projections that write into the residual stream start at 0.02 / sqrt(2 n_layers), so that the stream's variance
        does not grow with depth (GPT-2). The embedding starts at 0.3 / sqrt(dim): it is also the output matrix, whose
        logits then have a standard deviation of 0.3 at any width, and a fresh model's loss is ln V + 0.3^2 / 2. With
        0.02 it would be ln V + 0.10 at dim 512 and ln V + 0.15 at dim 768 (measured on random tokens).
        """
        std = 0.02
        residual_std = std / math.sqrt(2 * self.config.n_layers)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.3 / math.sqrt(self.config.dim))
        elif isinstance(module, nn.Linear | Router):
            init.normal_(module.weight, std=residual_std if hasattr(module, "into_residual") else std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_proj, std=std)
            init.normal_(module.up_proj, std=std)
            init.normal_(module.down_proj, std=residual_std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


class MiniMindModel(MiniMindPreTrainedModel):
    """The backbone: token ids to hidden states."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """As MiniMindForCausalLM; `last_hidden_state` is (B, T, D), `router_logits` n_layers x (B*T, experts)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        # The cache: `past` tokens are in it already, the T of this call come behind them.
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        T = hidden.shape[1]

        # Positions: 0, 1, 2, ... Padding on the left does not count: the mask 0 0 1 1 1 gives 0 0 0 1 2.
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + T, device=hidden.device)[None]

        frequencies, scale = rotary_frequencies(self.config, hidden.device)
        angles = position_ids[:, :, None, None].float() * frequencies  # (B, T, 1, C/2)
        rotary = angles.cos() * scale, angles.sin() * scale
        mask = causal_mask(attention_mask, past, T, hidden.device)

        # The blocks, one after the other; each adds to the same residual stream.
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.dropout(hidden)
        all_hidden, all_router_logits = (), ()
        for layer in self.layers:
            if output_hidden_states:
                all_hidden += (hidden,)
            hidden, router_logits = layer(hidden, rotary, mask, past_key_values=past_key_values)
            if router_logits is not None:
                all_router_logits += (router_logits.flatten(0, 1),)
        hidden = self.norm(hidden)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
            router_logits=all_router_logits or None,
        )


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """Backbone and output head; the head's matrix is the embedding's."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lengths: torch.Tensor | None = None,
        supervised: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, D).
            attention_mask: (B, S) 1 for real tokens, 0 for padding, over cache and input. Only left-padded batches need
                it: with padding on the right, causality already hides it from every real token.
            position_ids: (B, T); by default counted from the mask and the cache.
            past_key_values: a KVCache or any Hugging Face cache; holds the S - T tokens before these.
            labels: (B, T) as Hugging Face has them, shifted inside, -100 ignored: fills `loss` with the mean cross
                entropy, plus the mean `aux_loss` while training.
            use_cache: return a cache; by default when not training and `config.use_cache`.
            logits_to_keep: compute logits only for so many last positions (0: all), or for these indices.
            lengths: (B,) real tokens of each right-padded row; only the load-balance loss reads it.
            supervised: (N,) flat positions b*T + t; `logits` is then (N, V), of these positions only.

        Returns:
            A new output object: `logits` (B, T, V) or (N, V); `aux_loss` (B,) float32, the load-balance loss of each
            sequence, times `config.aux_loss_alpha`, summed over layers, without padding (zeros if dense);
            `router_logits` n_layers x (B*T, experts) if `output_router_logits`.

        Raises:
            ValueError: `labels` together with `supervised`, or a mask that does not cover cache and input.
        """
        if labels is not None and supervised is not None:
            raise ValueError("pass labels or supervised, not both: the loss of `supervised` is computed outside")
        if use_cache is None and supervised is not None:
            use_cache = False
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        B, T, _ = hidden.shape

        # The head is the dearest product of a small model (V is 12 times D): only for the positions that are asked for.
        if supervised is not None:
            kept = hidden.flatten(0, 1).index_select(0, supervised)
        elif isinstance(logits_to_keep, torch.Tensor):
            kept = hidden[:, logits_to_keep]
        else:
            kept = hidden[:, -logits_to_keep:]  # -0 keeps all
        logits = self.lm_head(kept)

        # A mixture of experts is also trained to spread its tokens; the loss of that is returned apart.
        aux_loss = torch.zeros(B, device=hidden.device)
        if self.config.use_moe:
            real = None
            if lengths is not None:
                real = torch.arange(T, device=hidden.device) < lengths[:, None]
            elif attention_mask is not None and attention_mask.dim() == 2:
                real = attention_mask[:, -T:].bool()
            stacked = torch.stack(outputs.router_logits).view(self.config.n_layers, B, T, -1)
            aux_loss = self.config.aux_loss_alpha * load_balance_loss(
                stacked, self.config.num_experts_per_tok, real, per_sequence=self.config.seq_aux
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                loss = loss + aux_loss.mean()
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits if output_router_logits else None,
        )
