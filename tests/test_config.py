"""LMConfig: its defaults and names, and every impossible value told at construction."""

import pytest
from transformers import PreTrainedConfig

from model.LMConfig import YARN_KEYS, LMConfig
from model.model import MiniMindForCausalLM

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97, "max_seq_len": 64}


def test_defaults_and_hugging_face_names():
    config = LMConfig()
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size) == (512, 8, 8, 2, 6400)
    assert (config.intermediate_size, config.head_dim, config.hidden_dim) == (1408, 64, None)
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (512, 8, 2)
    same = LMConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=1024, router_aux_loss_coef=0.1)
    assert (same.dim, same.n_layers, same.hidden_dim, same.aux_loss_alpha) == (768, 16, 1024, 0.1)
    assert isinstance(config, PreTrainedConfig) and config.tie_word_embeddings


def test_building_does_not_change_the_configuration():
    """Upstream G13: the first model wrote its feed-forward width into the configuration."""
    config = LMConfig(**TINY)
    before = config.to_dict()
    MiniMindForCausalLM(config)
    assert config.hidden_dim is None
    assert config.to_dict() == before
    config.dim = 64
    assert config.intermediate_size == 192  # follows the new width


def test_all_impossible_values_are_reported_at_once():
    with pytest.raises(ValueError) as error:
        LMConfig(dim=100, n_heads=8, n_kv_heads=3, vocab_size=70000, dropout=1.5, rope_theta=0, norm_eps=-1)
    for part in ("dim=100", "n_heads=8", "n_kv_heads=3", "vocab_size=70000", "65536", "dropout=1.5", "rope_theta=0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"n_layers": 2.5}, "n_layers=2.5"),
        ({"dim": True}, "dim=True"),
        ({"n_layers": 10**400}, r"n_layers=1000\S+\.\.\. must be a whole number"),
        ({"norm_eps": 10**400}, r"norm_eps=1000\S+\.\.\. must be a number"),
        ({"use_moe": "yes"}, "use_moe='yes' must be True or False"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be the number of a token"),
        ({"pad_token_id": -1}, "pad_token_id=-1 must be the number of a token"),
        ({"dim": 24, "n_heads": 8, "n_kv_heads": 2}, "must be even"),
        ({"use_moe": True, "num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds n_routed_experts=4"),
        ({"use_moe": True, "scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"use_moe": True, "n_shared_experts": 2}, "n_shared_experts=2"),
        ({"use_moe": True, "dim": 36, "n_heads": 2}, "multiples of 8"),
        ({"rope_scaling": {"rope_type": "magic", "factor": 2}}, "'magic'"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"norm_eps": None}, "norm_eps=None"),
        ({"use_moe": True, "aux_loss_alpha": float("nan")}, "aux_loss_alpha=nan"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "pass rope_theta and rope_scaling"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        LMConfig(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"factor": value}, f"factor {value!r} must be") for value in (0.5, 0, -2, None, "4", True, float("nan"))),
        *(({"factor": value}, f"factor {value!r} must be") for value in (float("inf"),)),
        *(({name: 0}, f"{name} 0 must be") for name in YARN_KEYS),
        *(({name: None}, f"{name} None must be") for name in YARN_KEYS),
        *(({name: -1.0}, f"{name} -1.0 must be") for name in YARN_KEYS),
        *(({name: float("nan")}, f"{name} nan must be") for name in YARN_KEYS),
        ({"beta_slow": 40}, "beta_fast must be greater"),
        ({"mscale": 1.0, "truncate": False}, "yarn has no mscale, truncate, only attention_factor"),
        ({"rope_type": "linear", "original_max_position_embeddings": 64}, "linear has no original_max_position"),
        ({"rope_type": "ntk", "type": "yarn"}, "type 'ntk' and 'yarn' is unknown"),
        ({"rope_type": None}, "type None is unknown"),
        ({"rope_type": ["yarn"]}, "is unknown"),
    ],
)
def test_impossible_rope_scalings(change, message):
    """Each gave NaN, a traceback in the forward pass, or was not read at all."""
    with pytest.raises(ValueError, match=message):
        LMConfig(**TINY, rope_scaling={"rope_type": "yarn", "factor": 4.0, **change})
    with pytest.raises(ValueError, match="must be a table"):
        LMConfig(**TINY, rope_scaling="yarn")
