"""config/*.py: every file trains, and a variant's config adds only the variant's own options."""

import runpy
from pathlib import Path

import pytest
from conftest import arguments
from runs import same_weights, stop_in_step

import prepare_data
import sample
import train

CONFIGS = Path(__file__).parents[2] / "config"
# variant: the options that its configs set besides `model`
VARIANTS = {
    "rope": set(),
    "gqa": {"n_kv_head"},
    "swa": {"window"},
    "rope_gqa_swa": {"n_kv_head", "window"},
}


def options_of(name):
    """Return the options that a config file sets."""
    names = runpy.run_path(str(CONFIGS / f"{name}.py"))
    return {key: value for key, value in names.items() if not key.startswith("_")}


OPTIONS = {path.stem: options_of(path.stem) for path in sorted(CONFIGS.glob("[!_]*.py"))}
FINEWEB = [name for name, options in OPTIONS.items() if options.get("dataset") == "fineweb"]


@pytest.mark.parametrize("name", FINEWEB)
def test_a_fineweb_config_evaluates_the_tokens_of_the_leaderboards(name):
    assert OPTIONS[name]["eval_tokens"] == prepare_data.FINEWEB_VAL_TOKENS == 10 * 2**20


@pytest.mark.parametrize("name", ["small_gpu", "large_gpu"])
def test_a_config_for_a_size_of_gpus_changes_results_by_rounding_only(name):
    assert OPTIONS[name].keys() <= {"batch_size", "activation_checkpointing"}


@pytest.mark.parametrize("base", ["gpt2", "gpt2_rope_5b", *(f"gpt2_{name}" for name in VARIANTS)])
def test_large_gpu_makes_a_step_one_micro_step_on_8_gpus(base):
    sequences = OPTIONS[base]["total_batch_size"] / 1024
    assert sequences / OPTIONS["large_gpu"]["batch_size"] == 8


def test_50_shards_are_enough_text_for_one_epoch_of_gpt2_rope_5b():
    options = OPTIONS["gpt2_rope_5b"]
    sequences = options["max_steps"] * options["total_batch_size"] // 1024
    assert sequences <= 50 * 100_000_000 // 1024 - 1  # the windows of an epoch, see Loader


def test_the_baby_gpt_has_the_numbers_of_nanogpt():
    """As in nanoGPT's config/train_shakespeare_char.py and the defaults of its train.py."""
    shape = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}
    shape |= {"bias": False, "dataset": "shakespeare_char", "total_batch_size": 64 * 256}
    rates = {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "max_steps": 5000}
    rates |= {"beta2": 0.99, "eval_interval": 250, "batch_size": 64}
    assert OPTIONS["shakespeare_char_gpu"] == shape | rates
    defaults = train.TrainConfig()
    assert (defaults.beta1, defaults.weight_decay, defaults.grad_clip) == (0.9, 0.1, 1.0)


@pytest.mark.parametrize("base", ["gpt2", "shakespeare_char"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_config_equals_its_base_except_for_the_variant_options(base, variant):
    base_options = options_of(base)
    variant_options = options_of(f"{base}_{variant}")
    added = {}
    for key in variant_options.keys() - base_options.keys():
        added[key] = variant_options.pop(key)
    assert variant_options == base_options
    assert added.pop("model") == f"model_{variant}"
    assert added.keys() == VARIANTS[variant]


EXAMPLES = ["shakespeare_char", "shakespeare_char_gpu"]


@pytest.mark.parametrize("name", [*(f"gpt2_{variant}" for variant in VARIANTS), *EXAMPLES])
def test_a_config_trains_resumes_bit_for_bit_and_can_be_sampled(workdir, capsys, name):
    changes = {"n_head": 4, "n_embd": 32, "max_steps": 4, "vocab_size": 257}
    argv = [str(CONFIGS / f"{name}.py"), *arguments(**changes)]
    stop_in_step(2, argv)
    assert (workdir / "out/tiny/step_00000002").exists()
    assert not (workdir / "out/tiny/step_00000004").exists()
    train.main(argv)
    train.main([*argv, "--out_dir=out/uninterrupted"])
    assert same_weights(workdir / "out/tiny", workdir / "out/uninterrupted")
    capsys.readouterr()
    sample.main(["--init_from=out/tiny", "--prompt=def ", "--max_new_tokens=30", "--temperature=0"])
    assert capsys.readouterr().out.startswith("def ")
