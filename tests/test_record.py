"""The table beside every weights file: what it says, when it is believed, and what is assumed where there is none."""

import json
import shutil

import pytest
import torch

from model.layouts import LAYOUTS, from_ours
from model.LMConfig import PUBLISHED, LMConfig, config_fields
from model.loading import save_weights
from model.model import MiniMindForCausalLM
from model.opening import load_model
from model.record import (
    adapter_remark,
    config_for,
    describe_file,
    describe_program,
    fingerprint,
    read_record,
    record_path,
    tokenizer_remark,
    write_record,
)
from model.sizes import Given, assume_config, sizes_of, sizes_of_config

SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}


def shapes_of(**fields) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = MiniMindForCausalLM(LMConfig(**fields))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def given(**values) -> dict[str, Given]:
    return {name: Given(value, f"--{name} {value}") for name, value in values.items()}


@pytest.fixture
def weights(tmp_path):
    """A weights file with its record."""
    return saved(tmp_path / "full_sft_32.pth", seed=0, dropout=0.25, max_seq_len=300, norm_eps=1e-6)


def saved(path, seed: int, **changes):
    torch.manual_seed(seed)
    config = LMConfig(**{**SMALL, **changes})
    save_weights(MiniMindForCausalLM(config).state_dict(), path)
    write_record(path, config, stage="full_sft", step=7, heldout={"heldout_loss": float("nan")})
    return path


# Files


def test_a_record_holds_every_field_and_what_else_is_known(weights):
    text = record_path(weights).read_text(encoding="utf-8")
    record = json.loads(text)
    assert (
        LMConfig(**record["config"]).to_dict()
        == LMConfig(**SMALL, dropout=0.25, max_seq_len=300, norm_eps=1e-6).to_dict()
    )
    assert (record["weights"], record["stage"], record["step"]) == ("full_sft_32.pth", "full_sft", 7)
    assert record["heldout"] == {"heldout_loss": None}  # JSON has no NaN
    assert record["written"].endswith("+00:00")
    assert text.startswith('{\n  "format": "minimind weights 1",\n  "weights"') and text.endswith("}\n")
    assert sorted(path.name for path in weights.parent.iterdir()) == ["full_sft_32.json", "full_sft_32.pth"]


def test_the_fingerprint_is_of_the_content_alone(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "one.pth")  # torch.save puts the file's name into the archive
    torch.save({"a": torch.ones(3)}, tmp_path / "other.pth")
    torch.save({"a": torch.tensor([1.0, 1.0, 2.0])}, tmp_path / "changed.pth")
    torch.save({"b": torch.ones(3)}, tmp_path / "renamed.pth")
    prints = [fingerprint(tmp_path / f"{name}.pth") for name in ("one", "other", "changed", "renamed")]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_the_record_of_other_weights_is_not_believed(weights, tmp_path):
    other = saved(tmp_path / "other_32.pth", seed=1)
    shutil.copy(other, weights)
    record, remark = read_record(weights)
    assert record is None and "full_sft_32.json is not used: it was written for other weights" in remark
    config, remarks = config_for(weights, {})
    assert config.norm_eps == 1e-5 and remark in remarks


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:100], "cannot be read"),
        (lambda text: "\0\xff", "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: "[1]", "its format is None"),
        (lambda text: text.replace("weights 1", "weights 2"), "its format is 'minimind weights 2', this version knows"),
        (lambda text: text.replace('"n_heads"', '"heads"'), "has not the fields of LMConfig"),
        (lambda text: text.replace('"n_heads": 4', '"n_heads": 5'), "dim=32 must be divisible by n_heads=5"),
        (lambda text: text.replace('"n_heads": 4', '"n_heads": "4"'), "n_heads='4' must be a whole number"),
        (lambda text: text.replace('"norm_eps": 1e-06', '"norm_eps": []'), "norm_eps=[] must be a number"),
        (lambda text: text[: text.index('"config"')] + '"config": 3}', "has not the fields of LMConfig"),
    ],
)
def test_a_bad_record_is_told_and_not_used(weights, change, reason):
    path = record_path(weights)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="latin-1")
    record, remark = read_record(weights)
    assert record is None and str(path) in remark and "is not used" in remark and reason in remark
    config, remarks = config_for(weights, given(n_heads=4))
    assert (config.dim, config.n_layers, config.n_kv_heads) == (32, 2, 2)
    assert remark in remarks and "has no usable record" in remarks[-1]


def test_damaged_weights_are_left_to_whoever_loads_them(weights):
    weights.write_bytes(weights.read_bytes()[:1000])
    assert read_record(weights) == (None, "")
    assert config_for(weights, given(dim=64))[0].dim == 64


def test_the_program_is_described(monkeypatch, tmp_path):
    described = describe_program()
    assert described["versions"]["torch"] == torch.__version__
    assert described["commit"] is None or len(described["commit"].removesuffix("-dirty")) == 40
    monkeypatch.setattr("model.record.REPO_ROOT", tmp_path)
    assert describe_program()["commit"] is None


def test_another_tokenizer_is_told(weights):
    write_record(weights, LMConfig(**SMALL), tokenizer="abc")
    assert tokenizer_remark(weights, "abc") == ""
    assert f"{weights} was trained with another tokenizer or chat template" in tokenizer_remark(weights, "abd")
    record_path(weights).unlink()
    assert tokenizer_remark(weights, "abd") == ""


def test_an_adapter_knows_the_weights_that_it_was_made_for(weights, tmp_path):
    other = saved(tmp_path / "rlhf_32.pth", seed=1)
    adapter = saved(tmp_path / "adapter_32.pth", seed=2)
    assert adapter_remark(adapter, weights) == ""  # nobody knows
    write_record(adapter, LMConfig(**SMALL), started_from=describe_file(weights))
    assert adapter_remark(adapter, weights) == ""
    assert f"{adapter} was trained on other weights than {other}: on {weights}" in adapter_remark(adapter, other)


# What a record decides


def test_a_model_is_what_its_record_says(weights):
    config, remarks = config_for(weights, {})
    assert not remarks
    assert (config.norm_eps, config.max_seq_len) == (1e-6, 300)
    assert config.dropout == 0  # a setting of the run that wrote it
    config, _ = config_for(weights, given(dropout=0.5, max_seq_len=100, flash_attn=False, dim=32, multiple_of=128))
    assert (config.dropout, config.max_seq_len, config.flash_attn, config.norm_eps) == (0.5, 100, False, 1e-6)


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dim": 64}, "--dim 64 contradicts dim 32 of"),
        ({"n_layers": 3}, "--n_layers 3 contradicts n_layers 2 of"),
        ({"use_moe": True}, "--use_moe True contradicts use_moe False of"),
        ({"hidden_dim": 64}, "--hidden_dim 64 contradicts hidden_dim 128 of"),
        ({"multiple_of": 24}, "--multiple_of 24 contradicts hidden_dim 128 of"),
        ({"n_heads": 4, "n_kv_heads": 4}, "--n_kv_heads 4 contradicts n_kv_heads 2 of"),
    ],
)
def test_what_contradicts_a_file_is_refused_with_both_values(weights, flags, message, has_record):
    if not has_record:
        record_path(weights).unlink()
    with pytest.raises(ValueError, match="contradicts") as error:
        config_for(weights, given(**flags))
    how = "its record says" if has_record else "its tensors show"
    assert f"{message} {weights} (as {how})" in str(error.value)


def test_only_a_record_knows_what_has_no_tensor(weights):
    flags = given(rope_theta=1e4, norm_eps=1e-5)
    with pytest.raises(ValueError, match="--rope_theta 10000.0 contradicts rope_theta 1000000.0") as error:
        config_for(weights, flags)
    assert "--norm_eps 1e-05 contradicts norm_eps 1e-06" in str(error.value)  # all at once
    record_path(weights).unlink()
    assert config_for(weights, flags)[0].rope_theta == 1e4


# Sizes from shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_known_by_its_shapes(name):
    config, assumed = assume_config(shapes_of(**PUBLISHED[name]), "ours", {})
    assert config_fields(config) == config_fields(LMConfig(**PUBLISHED[name]))
    assert f"as in {name}" in assumed and "rope_theta" in assumed
    assert ("n_heads" in assumed) == (not config.qk_norm)  # a norm for each head shows how wide a head is
    assert ("num_experts_per_tok" in assumed) == config.use_moe


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "n_heads": 2, "n_kv_heads": 1},
        {"hidden_dim": 40},
        {"use_moe": True, "n_routed_experts": 3, "n_shared_experts": False},
        {"use_moe": True, "hidden_dim": 48},
    ],
)
def test_shapes_show_all_sizes(changes):
    fields = {**SMALL, **changes}
    config = LMConfig(**fields)
    assert sizes_of(shapes_of(**fields)) == sizes_of_config(config)
    flags = given(norm_eps=config.norm_eps, **({} if config.qk_norm else {"n_heads": 4}))
    assumed, told = assume_config(shapes_of(**fields), "ours", flags)
    expected = config_fields(config)
    if config.qk_norm:  # today's MiniMind, whatever its size
        expected["max_seq_len"] = 32768
    assert config_fields(assumed) == expected
    assert told.endswith("(as in minimind-3)" if config.qk_norm else "(by default)") and "n_heads" not in told


@pytest.mark.parametrize(
    "layout, fields, like",
    [
        ("2025-02", {"n_heads": 16, "n_kv_heads": 8, "rope_theta": 1e4, "max_seq_len": 512}, "minimind-v1-small"),
        ("2025-02", {"n_heads": 8, "n_kv_heads": 2}, None),
        ("2025-04", {"use_moe": True}, None),
        ("ours", {"n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6, "max_seq_len": 32768}, "minimind-3"),
        ("2025-04", {**PUBLISHED["minimind-3-moe"], "hidden_dim": None}, "minimind-3-moe"),
    ],
)
def test_minimind_files_of_any_age_and_size_need_no_flags(tmp_path, layout, fields, like):
    """What their shapes do not show is as in the published models of the same age."""
    config = LMConfig(**{**fields, "dim": 64, "n_layers": 2, "aux_loss_alpha": 0.01, "seq_aux": True})
    model = MiniMindForCausalLM(config).eval()
    theirs = from_ours(model.state_dict(), LAYOUTS[layout], config.head_dim)
    torch.save({name: tensor.half() for name, tensor in theirs.items()}, tmp_path / "full_sft_64.pth")
    found, (remark,) = config_for(tmp_path / "full_sft_64.pth", {})
    assert config_fields(found) == config_fields(config)
    assert (f"(as in {like})" if like else "(by default)") in remark
    loaded = load_model(found, tmp_path / "full_sft_64.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor.half().float()) for name, tensor in model.state_dict().items())


def test_heads_are_assumed_where_nothing_shows_them(weights):
    record_path(weights).unlink()
    config, remarks = config_for(weights, {})
    assert (config.n_heads, config.n_kv_heads) == (8, 4)  # the same shapes as 4 and 2
    (remark,) = remarks
    assert remark == (
        f"{weights} has no {record_path(weights).name} beside it: sizes as its tensors show; assumed: n_heads 8, "
        "rope_theta 1000000.0, "
        "norm_eps 1e-05 (by default), and that its tokens are those of model/minimind_tokenizer (MiniMind's own files "
        "need theirs, by --tokenizer_path)"
    )


def test_nothing_is_assumed_that_is_given(weights):
    record_path(weights).unlink()
    assert config_for(weights, given(n_heads=4, rope_theta=1e6, norm_eps=1e-6))[1] == []


@pytest.mark.parametrize("field, value", [("n_layers", 10**9), ("hidden_dim", 10**9), ("qk_norm", True), ("dim", 64)])
def test_a_record_that_contradicts_its_tensors_is_not_believed(weights, field, value):
    path = record_path(weights)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"][field] = value
    path.write_text(json.dumps(record), encoding="utf-8")
    config, remarks = config_for(weights, given(n_heads=4))  # no such model could even be built
    assert (config.dim, config.n_layers, config.qk_norm) == (32, 2, False)
    assert "is not used: it says" in remarks[0] and "but its tensors show" in remarks[0]


def test_only_the_ending_of_a_name_is_replaced():
    assert record_path("out/full_sft.v2_64.pth").name == "full_sft.v2_64.json"
    assert record_path("out/full_sft.v2_64").name == "full_sft.v2_64.json"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"embed_tokens.weight": (0, 0)}, "model.embed_tokens.weight is empty"),
        ({"layers.0.self_attn.q_norm.weight": (1000,)}, "its heads have 1000 channels, and the whole model dim 4"),
        ({}, "dim/n_heads = 4/8: pass the --n_heads"),
        ({"layers.0.mlp.experts.gate_proj": (4,), "layers.0.mlp.gate_proj.weight": ()}, "another layout"),
    ],
)
def test_sizes_that_no_model_has_are_told(changes, reason):
    shapes = {
        "embed_tokens.weight": (100, 4),
        "layers.0.self_attn.k_proj.weight": (32, 4),
        "layers.0.mlp.gate_proj.weight": (8, 4),
    }
    with pytest.raises(ValueError, match=reason):
        assume_config({f"model.{name}": shape for name, shape in (shapes | changes).items()}, "ours", {})


def test_impossible_heads_name_the_flag(weights):
    record_path(weights).unlink()
    for n_heads in (1, 5):
        with pytest.raises(ValueError, match=f"dim/n_heads = 32/{n_heads}: pass the --n_heads"):
            config_for(weights, given(n_heads=n_heads))


@pytest.mark.parametrize("shapes", [{}, {"a": (1,)}, {"model.embed_tokens.weight": (3,)}, {"layers.0.wq": (2, 2)}])
def test_another_layout_is_no_model_of_ours(shapes):
    assert sizes_of(shapes) is None
    with pytest.raises(ValueError, match="another layout"):
        assume_config(shapes, "ours", {})
