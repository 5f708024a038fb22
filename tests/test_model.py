"""The transformer against transformers' own outputs, and the loader against every damaged checkpoint we could think of.

Golden fixtures come from tests.make_fixtures.py; the live tests run where transformers is installed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from data.hub import UserError
from data.weights import config_fields, shard_paths
from model import Config, RMSNorm, Transformer, rope
from tests.toys import FIXTURES, GOLDEN, assert_close, edit, toy_config, toy_model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A private copy of an untied Qwen3 checkpoint, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "qwen3-untied", tmp_path / "checkpoint"))


def edit_config(folder: Path, **changes) -> None:
    """Sets fields of config.json, or removes those given as None."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def shard(folder: Path) -> list[str]:
    """Splits model.safetensors into three shards with an index, as the hub holds large models."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: names[i % 3] for i, name in enumerate(sorted(tensors))}
    for shard_name in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard_name}, folder / shard_name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


# ------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_transformers_golden_ones(name):
    """Any slip in the architecture shows here: norm, bias, RoPE, grouping, gating, tying. Every result rests on it."""
    golden = load_file(FIXTURES / name / "golden.safetensors")
    for dtype in (torch.float32, torch.float64):
        assert_close(Transformer.from_pretrained(FIXTURES / name, dtype=dtype)(golden["ids"]), golden["logits"], 1e-5)


def test_bfloat16_logits_equal_transformers_golden_ones():
    """A model trained in bf16 would be run as another one.

    bf16 keeps 8 significant bits: one rounding is up to 0.2%, some dozens lie between input and logits, and how a
    CPU kernel groups its sums differs between machines. The same weights run in float32 differ by 0.7% of the largest
    logit, ours in bf16 by 0.8%; 2% leaves room for another machine's kernels. The cast order has its own exact test.
    """
    golden = load_file(FIXTURES / "qwen3-tied-bf16" / "golden.safetensors")
    model = Transformer.from_pretrained(FIXTURES / "qwen3-tied-bf16", dtype=torch.bfloat16)
    logits = model(golden["ids"])
    assert logits.dtype == torch.bfloat16
    assert_close(logits, golden["logits"], 0.02)


def test_rotary_tables_of_a_bfloat16_model_are_rounded_only_at_the_end():
    """In bfloat16 positions from 256 on collapse into even ones, then fours: a long response would lose its order."""
    for exact, ours in zip(*(rope(2000, toy_config(), torch.zeros(1, dtype=dtype)) for dtype in (
            torch.float64, torch.bfloat16)), strict=True):
        assert ours.dtype == torch.bfloat16 and (ours.double() - exact).abs().max() < 2**-8


def test_rmsnorm_casts_to_bfloat16_before_it_multiplies_by_the_weight():
    """Hugging Face casts first; the other order rounds differently, in every norm of every layer."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((50, 20), (20,)))
    norm = RMSNorm(20, 1e-3).bfloat16()
    norm.weight.data = weight
    wanted = torch.empty_like(x)
    for i in range(50):
        scale = 1.0 / (sum(float(v) ** 2 for v in x[i]) / 20 + 1e-3) ** 0.5
        wanted[i] = (x[i].float() * scale).bfloat16() * weight
    assert torch.equal(norm(x), wanted)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind, changes", [("qwen2", {}), ("qwen3", {}), ("qwen3", {"attention_bias": True})])
def test_logits_equal_live_transformers(kind, changes, tied, sharded, tmp_path):
    """The installed transformers may write what our golden files don't show: shards, new keys, an output bias."""
    pytest.importorskip("transformers")
    from tests.make_fixtures import random_hf_model

    hf = random_hf_model(kind, tied, seed=7, **changes)
    hf.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ids = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    assert_close(Transformer.from_pretrained(tmp_path)(ids), hf(ids).logits, 1e-5)


def test_right_padding_does_not_change_the_logits_of_real_positions():
    """Scoring pads on the right without a mask: if padding leaked, every ragged batch would be scored wrongly."""
    model = toy_model().double()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 61, (n,), generator=generator) for n in (3, 11, 7, 1)]
    for padding in (0, 60):
        ids = torch.full((4, 11), padding)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        for logits, tokens in zip(model(ids), rows, strict=True):
            assert_close(logits[: len(tokens)], model(tokens[None])[0])


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("rope", [
    {"rope_theta": 100.0, "rope_scaling": None, "torch_dtype": "float32", "dtype": None},
    {"rope_theta": 100.0, "rope_scaling": {"type": "default"}},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 100.0}}},
])
def test_both_config_generations_give_identical_logits(rope, checkpoint):
    """A RoPE base read from the wrong place falls back to 10,000: the model still talks, only worse."""
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        wanted = Transformer.from_pretrained(checkpoint)(ids)
        edit_config(checkpoint, rope_parameters=None)
        assert not torch.equal(Transformer.from_pretrained(checkpoint)(ids), wanted)  # the base matters
        edit_config(checkpoint, **rope)
        assert torch.equal(Transformer.from_pretrained(checkpoint)(ids), wanted)


def test_qwen2_without_head_dim_divides_the_width_among_the_heads():
    """Qwen2 checkpoints of the hub have no head_dim, nor a field that says there are biases."""
    config = Config(**config_fields({"model_type": "qwen2", "vocab_size": 61, "hidden_size": 48,
                                     "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 6}))
    assert (config.head_dim, config.num_key_value_heads, config.attention_bias) == (8, 6, True)


@pytest.mark.parametrize("changes, named", [
    ({"model_type": "gemma"}, ["model_type", "gemma"]),
    ({"model_type": "qwen3_moe"}, ["model_type", "qwen3_moe"]),
    ({"model_type": None}, ["model_type"]),
    ({"num_experts": 8}, ["num_experts"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    ({"use_sliding_window": True, "layer_types": None, "sliding_window": 8}, ["use_sliding_window", "sliding"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}}, ["rope_parameters", "yarn"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, ["rope_parameters", "linear"]),
    ({"rope_parameters": "default"}, ["rope_parameters"]),
    ({"rope_parameters": {"full_attention": "default"}}, ["rope_parameters"]),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic"]),
    ({"hidden_size": None}, ["hidden_size", "missing"]),
    *((changes, [f"{list(changes)[0]} = "]) for changes in (
        {"num_hidden_layers": "8"}, {"num_hidden_layers": 10**6}, {"rms_norm_eps": -1.0}, {"vocab_size": 0},
        {"tie_word_embeddings": "yes"}, {"num_key_value_heads": 4}, {"hidden_size": 0}, {"model_type": 3},
        {"head_dim": 7}, {"head_dim": None, "num_attention_heads": 99, "num_key_value_heads": 99})),
    ({"rope_parameters": {"rope_theta": -1}}, ["rope_theta = -1"]),
])
def test_what_is_not_implemented_or_out_of_range_is_refused_by_name(changes, named, checkpoint):
    """Run as plain attention and plain RoPE, such a checkpoint would load and answer wrongly without a word; or it ends
    in a traceback, takes all memory, or trains on NaN and completes."""
    edit_config(checkpoint, **changes)
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(checkpoint)
    for word in ["config.json", *named]:
        assert word in str(error.value)


def test_a_model_of_the_hub_is_refused_before_its_weights_come(checkpoint, monkeypatch):
    """Else whoever tries Llama 3.1 waits for 16 GB, and is then told to take away what it was trained with."""
    edit_config(checkpoint, rope_parameters=None, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    asked = []
    monkeypatch.setattr(model, "resolve", lambda *args, patterns=("all",): asked.extend(patterns) or checkpoint)
    with pytest.raises(UserError, match="Llama 3.1 or later"):
        Transformer.from_pretrained("some/llama")
    assert asked and not {"all", "*.safetensors"} & set(asked)


def test_a_sliding_window_that_is_switched_off_is_accepted(checkpoint):
    """Qwen2.5 and R1-Distill name a window they don't use; refusing them would refuse the paper's model."""
    edit_config(checkpoint, use_sliding_window=False, sliding_window=4, max_window_layers=1, layer_types=None)
    golden = load_file(checkpoint / "golden.safetensors")
    assert_close(Transformer.from_pretrained(checkpoint)(golden["ids"]), golden["logits"], 1e-5)


# -------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("sharded", [False, True])
def test_one_error_lists_missing_unexpected_and_misshaped_tensors(sharded, checkpoint):
    """A loader that skips names leaves random weights behind; one that stops at the first costs a user hours."""
    def damage(tensors):
        del tensors["model.layers.0.self_attn.k_norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
        tensors["model.norm.weight"] = torch.ones(21)
    edit(checkpoint / "model.safetensors", damage)
    if sharded:
        shard(checkpoint)
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(checkpoint)
    for problem in ("missing model.layers.0.self_attn.k_norm.weight", "missing lm_head.weight",
                    "unexpected model.layers.0.self_attn.q_proj.bias", "model.norm.weight has shape (21,), not (20,)"):
        assert problem in str(error.value)
    assert "model.layers.1" not in str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_rotary_frequencies_of_old_llama_checkpoints_are_passed_over(sharded, checkpoint):
    """Early transformers wrote them. They follow from the config; to refuse them is to refuse those models."""
    edit(checkpoint / "model.safetensors", lambda tensors: tensors.update({
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}))
    if sharded:
        shard(checkpoint)
    golden = load_file(checkpoint / "golden.safetensors")
    assert_close(Transformer.from_pretrained(checkpoint)(golden["ids"]), golden["logits"], 1e-5)


def test_every_parameter_is_materialised_once_in_the_asked_dtype(checkpoint):
    """A parameter left on the meta device fails deep in a forward pass; one in another dtype doubles the memory."""
    shard(checkpoint)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Transformer.from_pretrained(checkpoint, dtype=dtype)
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, "cpu")}
        assert not [name for name, b in model.named_buffers() if b.is_meta]
        assert not model.training


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_named(checkpoint):
    """The hub client may hand out partial folders when offline."""
    absent = shard(checkpoint)[1]
    (checkpoint / absent).unlink()
    with pytest.raises(UserError, match=f"{absent} missing"):
        Transformer.from_pretrained(checkpoint)


def test_an_index_beside_a_whole_file_is_left_from_before(checkpoint):
    """Else the old shards are loaded where a new model.safetensors was saved into their folder."""
    whole = (checkpoint / "model.safetensors").read_bytes()
    shard(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(whole)
    assert shard_paths(checkpoint) == [checkpoint / "model.safetensors"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_file_is_named(sharded, checkpoint):
    """A download that broke off."""
    name = shard(checkpoint)[2] if sharded else "model.safetensors"
    whole = (checkpoint / name).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 5, 0):
        (checkpoint / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{name} is missing, damaged or truncated"):
            Transformer.from_pretrained(checkpoint)


@pytest.mark.parametrize("index, named", [
    ("[", "can't be read"), ("[]", "does not hold"), ("{}", "'weight_map' is missing"),
    ('{"weight_map": []}', "weight_map"), ('{"weight_map": {}}', "missing"),
    ('{"weight_map": {"a": 1}}', "index.json: a = 1"), ('{"weight_map": {"a": "x\\u0000"}}', "must be a text"),
    *((json.dumps({"weight_map": {"a": name}}), "outside the folder") for name in ("../x", "/etc/passwd", "sub/x")),
])
def test_a_damaged_index_is_named(index, named, checkpoint):
    """Else a traceback from deep inside; or an index, which comes from a stranger, opens other files of the machine."""
    (checkpoint / "model.safetensors").rename(checkpoint / "x")
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=named):
        Transformer.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00"])
def test_a_missing_or_malformed_config_is_named(content, checkpoint):
    """The commonest mistake is to give the wrong folder."""
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    told = "is missing" if content is None else "(can't be read|does not hold)"
    with pytest.raises(UserError, match=f"config.json {told}"):
        Transformer.from_pretrained(checkpoint)


def test_a_tied_checkpoint_with_a_stored_head_copy_loads_and_stays_tied(tmp_path):
    """Some writers store the tied head too; it is neither an unexpected tensor nor a second matrix."""
    folder = Path(shutil.copytree(FIXTURES / "qwen3-tied", tmp_path / "tied"))
    edit(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    golden, model = load_file(folder / "golden.safetensors"), Transformer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(model(golden["ids"]), golden["logits"], 1e-5)


def test_a_loaded_model_knows_its_name_and_commit(tmp_path):
    """The adapter's config names both: without them a run can't be reproduced."""
    folder = Path(shutil.copytree(FIXTURES / "qwen3-tied", tmp_path / "snapshots" / "0123abcd"))
    model = Transformer.from_pretrained(folder)
    assert (model.name, model.revision) == (str(folder), "0123abcd")
    assert Transformer.from_pretrained(FIXTURES / "qwen3-tied", revision="v1").revision == "v1"
