"""What do the variants write? One prompt, continued by each of them.

    python -m experiments.samples --preset=cpu

The runs are those of experiments.quality, with the first seed. All are sampled with the same
options and the same seed.
"""

import sys

import torch

from common.errors import run_program
from common.pretrained import load_model
from common.tokenizer import get_tokenizer
from configurator import configure
from experiments.runs import PRESETS, train_variant, variants
from experiments.study import Study, StudyConfig, texts
from sample import generate_text

PROMPTS = {  # by dataset
    "stdlib": "def read(self, size=-1):\n",
    "fineweb": "The best way to learn a language is",
}


def continue_prompt(config, name, device):
    """Return the text of 200 tokens that a variant writes after the prompt."""
    model, meta = load_model(train_variant(config, name, config.seeds[0]))
    prompt = PROMPTS[config.run["dataset"]]
    text = generate_text(
        model.to(device),
        get_tokenizer(meta),
        prompt,
        max_new_tokens=200,
        temperature=0.7,
        top_k=200,
        generator=torch.Generator(device).manual_seed(1),
    )
    return text.removeprefix(prompt)


def main(argv):
    study = Study("samples", configure(StudyConfig, argv, __doc__), PRESETS)
    for name in variants(study.config.run):
        study.add(name, name, continue_prompt, study.config, name, study.device)
    study.run(texts)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
