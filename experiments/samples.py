"""What do they write? One prompt, continued by every variant.

    python -m experiments.samples --preset=cpu

The runs are experiments.table's, of the first seed; sampled alike, with one seed of sampling.
"""

import sys

import torch

from common.errors import program
from common.pretrained import load_model
from common.tokenizer import encode, get_tokenizer
from configurator import configure
from experiments.runs import PRESETS, run_of, variants
from experiments.study import Study, StudyConfig
from sample import TextStream, generate

PROMPTS = {"stdlib": "def read(self, size=-1):\n", "fineweb": "The best way to learn a language is"}


def sample(config, name, device):
    """The text of 200 tokens behind the prompt."""
    model, meta = load_model(run_of(config, name, config.seeds[0]))
    tokenizer = get_tokenizer(meta)
    prompt = torch.tensor(
        [encode(tokenizer, PROMPTS[config.run["dataset"]]).tolist()], device=device
    )
    one, how = TextStream(tokenizer), {"temperature": 0.7, "top_k": 200}
    how["generator"] = torch.Generator(device).manual_seed(1)
    tokens = generate(model.to(device).eval(), prompt, 200, vocab_size=meta["vocab_size"], **how)
    return "".join(one.add(int(token)) for token in tokens) + one.finish()


@program
def main(argv):
    study = Study("samples", configure(StudyConfig, argv, __doc__), PRESETS)
    for name in variants(**study.config.run):
        print(study.point(name, sample, study.config, name, study.device))
    study.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
