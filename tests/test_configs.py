"""config/: every file trains, and those of the variants differ from their base by the variant alone."""

import runpy
import signal
from pathlib import Path

import pytest
import torch
from conftest import arguments

import sample
import train
from common.pretrained import load_model

CONFIGS = Path(__file__).parent.parent / "config"
VARIANTS = {
    "rope": set(),
    "gqa": {"n_kv_head"},
    "swa": {"window"},
    "rope_gqa_swa": {"n_kv_head", "window"},
}


def options_of(name):
    return {
        key: value
        for key, value in runpy.run_path(str(CONFIGS / f"{name}.py")).items()
        if key[0] != "_"
    }


@pytest.mark.parametrize("base", ["gpt2", "shakespeare_char"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_s_config_is_its_base_but_for_the_variant(base, variant):
    plain, varied = options_of(base), options_of(f"{base}_{variant}")
    own = {key: varied.pop(key) for key in varied.keys() - plain.keys()}
    assert varied == plain
    assert own.pop("model") == f"model_{variant}" and own.keys() == VARIANTS[variant]


@pytest.mark.parametrize("base", ["gpt2", "shakespeare_char"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_stops_goes_on_to_the_same_bits_and_can_be_sampled(
    workdir, monkeypatch, capsys, base, variant
):
    argv = [
        str(CONFIGS / f"{base}_{variant}.py"),
        *arguments(n_head=4, n_embd=32, max_steps=4, vocab_size=257),
    ]
    original = train.train_step

    def stop_in_step_3(run):
        if run.step == 2 and not run.stop.received:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "train_step", stop_in_step_3)
    train.main(argv)
    assert "stopped after step 2" in capsys.readouterr().out
    monkeypatch.setattr(train, "train_step", original)
    train.main(argv)
    train.main([*argv, "--out_dir=out/whole"])
    stopped, whole = (load_model(f"out/{name}")[0].state_dict() for name in ("tiny", "whole"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    capsys.readouterr()
    sample.main(["--init_from=out/tiny", "--prompt=def ", "--max_new_tokens=30", "--temperature=0"])
    assert capsys.readouterr().out.startswith("def ")
