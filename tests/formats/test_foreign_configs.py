"""Every field of config.json, missing, null or by another name, is what it is in transformers.

transformers is the oracle: load_model reads the same model, or raises UserError.
"""

import dataclasses
import json
import shutil

import pytest
from foreign import load_error, random_gpt2, random_gpt_neo, read_as_there
from safetensors.torch import load_file, save_file
from starcoder2 import starcoder2

from common.pretrained import load_model
from common.transformers_format import FORMATS

# The numbers of heads are those that transformers takes if config.json has none.
MODELS = {
    "gpt2": lambda: random_gpt2(n_head=12, n_embd=192, n_positions=48, vocab_size=61),
    "starcoder2": lambda: starcoder2(2, 24, 48, 61, n_kv_head=2, rope_theta=777.0, window=5),
    "gpt_neo": lambda: random_gpt_neo(n_head=16, n_embd=64),
}
CONFIGS = {name: make().config for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each format, with config.json that has all fields."""
    folders = {}
    for name, make in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
        (folders[name] / "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 61}')
    return folders


@pytest.fixture
def read_with(saved, tmp_path):
    """A function: read_as_there of a format's folder after a change of config.json."""

    def read(name, changes, without=()):
        folder = shutil.copytree(saved[name], tmp_path, dirs_exist_ok=True)
        config = CONFIGS[name].to_dict() | changes
        config = {key: value for key, value in config.items() if key not in without}
        (folder / "config.json").write_text(json.dumps(config))
        return read_as_there(folder)

    return read


KEYS = [
    (name, key)
    for name, config in CONFIGS.items()
    for key in (*config.to_dict(), "per_layer_config", "is_causal")
]
ALIASES = [
    (name, alias, key)
    for name, config in CONFIGS.items()
    for alias, key in config.attribute_map.items()
]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_key_that_is_missing_or_null_means_what_it_means_in_transformers(read_with, name, key):
    read_with(name, {}, without=[key])
    read_with(name, {key: None})


@pytest.mark.parametrize(("name", "alias", "key"), ALIASES)
def test_a_key_by_its_other_name_means_the_same(read_with, name, alias, key):
    assert read_with(name, {alias: getattr(CONFIGS[name], key)}, without=[key])


@pytest.mark.parametrize(("name", "alias", "key"), ALIASES)
def test_of_two_names_for_a_key_the_same_one_decides_as_in_transformers(
    read_with, name, alias, key
):
    value = getattr(CONFIGS[name], key)
    for other in (value * 2, value // 2, None, True):
        read_with(name, {key: other, alias: value})
        read_with(name, {key: value, alias: other})


ROPE = [
    {"rope_theta": 500.0},
    {"rope_theta": 500},
    {"rope_theta": None},
    {"rope_theta": "500"},
    {"rope_theta": 10**400},
    {"rope_scaling": None, "rope_theta": 500.0},
    {"rope_scaling": {"type": "default"}, "rope_theta": 500.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_theta": 300.0}, "rope_parameters": {"rope_theta": 500.0}},
    {"rope_scaling": [], "rope_parameters": {"rope_theta": 500.0}},
    {"rope_parameters": {"type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"type": "linear", "rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_theta": 300.0}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_type": None, "rope_theta": 500.0}},
    {"rope_parameters": {"rope_theta": None}},
    {"rope_parameters": []},
    {"rope_parameters": None, "partial_rotary_factor": 0.5},
]


@pytest.mark.parametrize("rope", ROPE, ids=lambda rope: str(rope)[:60])
def test_rope_in_old_and_new_forms_is_that_of_transformers(read_with, rope):
    read_with("starcoder2", rope, without={"rope_parameters"} - rope.keys())


@pytest.mark.parametrize("rope", [ROPE[0], ROPE[1], ROPE[5], ROPE[6], ROPE[10], ROPE[13]], ids=str)
def test_each_form_of_a_plain_rope_theta_is_read(read_with, tmp_path, rope):
    assert read_with("starcoder2", rope, without={"rope_parameters"} - rope.keys())
    assert load_model(str(tmp_path))[0].config.rope_theta == 500.0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"per_layer_config": {"1": {"layer_norm_epsilon": 0.5}}}),
        ("gpt2", {"transformers_weights": "other.safetensors"}),
        ("gpt2", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        ("gpt2", {"n_ctx": 7}),
        ("gpt2", {"is_encoder_decoder": True}),
        ("gpt2", {"is_causal": False}),
        ("starcoder2", {"is_causal": False}),
        ("gpt_neo", {"is_causal": False}),
        ("starcoder2", {"head_dim": None}),
        ("starcoder2", {"head_dim": 4}),
        ("starcoder2", {"num_key_value_heads": 24}),
        ("gpt_neo", {"attention_layers": ["global", "global"]}),
        ("gpt_neo", {"attention_layers": ["local", "global"], "attention_types": None}),
        ("gpt_neo", {"attention_types": [[["local", "local"], 1]]}),
    ],
    ids=str,
)
def test_a_field_that_changes_the_model_is_read_as_in_transformers(saved, read_with, name, changes):
    tensors = load_file(saved[name] / "model.safetensors")
    other = {key: w + 0.1 for key, w in tensors.items()}
    save_file(other, saved[name] / "other.safetensors")
    read_with(name, changes)


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_attention_to_later_tokens_is_refused_by_its_field(read_with, tmp_path, name):
    assert read_with(name, {"is_causal": True})
    assert not read_with(name, {"is_causal": False})
    assert "is_causal=False" in load_error(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_are_those_of_transformers(name):
    theirs = {field.name: field.default for field in dataclasses.fields(CONFIGS[name])}
    ours = FORMATS[name].defaults | FORMATS[name].fixed
    assert {key: theirs.get(key) for key in ours} == ours


def test_without_a_number_of_heads_gpt2_has_the_twelve_of_transformers(read_with, tmp_path):
    assert read_with("gpt2", {}, without=["n_head"])
    assert load_model(str(tmp_path))[0].config.n_head == 12
