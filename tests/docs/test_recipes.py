"""The Python in docs/ runs; each diff of YOUR_OWN_VARIANT.md makes the model its check accepts."""

import copy
import csv
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPT2, arguments, read_log
from documents import block
from variants import close, feed, last_logits, make, make_vivid, tokens

import model as model_base
import model_rope
import prepare_data
import train
from common.pretrained import load_model
from common.tokenizer import get_tokenizer
from experiments import extension, runs
from sample import generate_text
from tools.export import export
from train import TrainConfig
from training.optimizer import OPTIMIZERS, hidden_matrices, make_optimizer
from training.parallel import check_model

ROOT = Path(__file__).parents[2]


def apply_diff(text, diff):
    """Apply a unified diff to a text; each hunk must fit in exactly one place."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = [line or " " for line in hunk.splitlines()]  # an editor may strip a blank line
        old = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        new = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


BASE = (ROOT / "model.py").read_text(encoding="utf-8")
CHECK = block("python", "from model_mine import")
QKNORM_CHECK = block("python", "from model_qknorm import")


@pytest.fixture
def alibi_source():
    """The text of the model file that the diff makes of model.py."""
    return apply_diff(BASE, block("diff", "ALiBi"))


@pytest.fixture
def qknorm_source():
    return apply_diff(BASE, block("diff", "QK-norm"))


@pytest.fixture
def import_mine(tmp_path, monkeypatch):
    """Return a function that makes a text importable under a name, and imports it."""

    def import_text(text, name="model_mine"):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return import_text


@pytest.fixture
def alibi(alibi_source, import_mine):
    return import_mine(alibi_source)


@pytest.fixture
def qknorm(qknorm_source, import_mine):
    return import_mine(qknorm_source, "model_qknorm")


# ALiBi: the diff ------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch")
@pytest.mark.parametrize("name, source", [("mine", "alibi_source"), ("qknorm", "qknorm_source")])
def test_the_command_of_the_page_makes_the_model_file(name, source, tmp_path, request):
    shutil.copy(ROOT / "model.py", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/YOUR_OWN_VARIANT.md", tmp_path / "docs")
    command = block("", f"| patch -o model_{name}.py")
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "Hunk" not in done.stdout + done.stderr  # printed if an offset or fuzz was needed
    made = (tmp_path / f"model_{name}.py").read_text(encoding="utf-8")
    assert made == request.getfixturevalue(source)


def test_the_model_has_no_wpe_and_no_buffers(alibi):
    model = make(alibi)
    assert "wpe" not in model.transformer
    assert list(model.buffers()) == []


def test_the_slopes_for_8_heads_are_those_of_the_paper(alibi):
    bias = alibi.alibi_bias(8, 1, 2, device="cpu")  # one query, at distance 1 and 0
    assert bias[0, :, 0, 0].tolist() == [-1 / 2**h for h in range(1, 9)]
    assert bias[0, :, 0, 1].tolist() == [0] * 8


def test_the_bias_is_float32_for_a_bfloat16_default_dtype(alibi):
    torch.set_default_dtype(torch.bfloat16)
    try:
        bias = alibi.alibi_bias(2, 1, 1000, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert bias.dtype == torch.float32
    assert bias[0, 0, 0].tolist() == [-distance / 16 for distance in range(999, -1, -1)]


@pytest.mark.parametrize("prompt", [1, 2, 15])
def test_decoding_token_by_token_gives_the_logits_of_full_forward_passes(alibi, prompt):
    model, x = make_vivid(alibi), tokens(2, 16)
    cached = feed(model, model.make_cache(2), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    close(cached, last_logits(model, x)[:, prompt - 1 :])


def test_the_model_takes_sequences_longer_than_block_size(alibi):
    model = make_vivid(alibi)
    x = tokens(2, 3 * model.config.block_size)
    cache = model.make_cache(2, max_len=x.size(1))
    cached = feed(model, cache, x[:, :20], x[:, 20:40], *x[:, 40:].split(1, dim=1))
    close(cached[:, 1:], last_logits(model, x)[:, 39:])
    assert model(x, x).isfinite()


# ALiBi: the brute-force check -----------------------------------------------------------------


def test_the_check_accepts_the_model(alibi):
    exec(CHECK, {})


MUTANTS = {
    "sign flipped": ("bias = -slopes", "bias = slopes"),
    "bias 0": ("bias = -slopes", "bias = 0 * slopes"),
    "slopes without n_head": ("-8 * heads / n_head", "-heads"),
    "slopes from h = 0": ("-8 * heads", "-8 * (heads - 1)"),
    "bias missing in decode": ("(q.dtype)", "(q.dtype) * (T > 1)"),
    "bias missing in chunks": ("(q.dtype)", "(q.dtype) * (T in (1, S))"),
    "bias missing in training": ("(q.dtype)", "(q.dtype) * (T < S)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_refuses_a_wrong_idea(name, alibi_source, import_mine):
    old, new = MUTANTS[name]
    assert alibi_source.count(old) == 1
    import_mine(alibi_source.replace(old, new))
    with pytest.raises(AssertionError):
        exec(CHECK, {})


@pytest.mark.parametrize("name", ["sign flipped", "bias 0", "slopes without n_head"])
def test_a_wrong_idea_agrees_with_its_own_full_forward_passes(name, alibi_source, import_mine):
    model, x = make_vivid(import_mine(alibi_source.replace(*MUTANTS[name]))), tokens(2, 16)
    cached = feed(model, model.make_cache(2), x[:, :5], x[:, 5:9], *x[:, 9:].split(1, dim=1))
    close(cached[:, 1:], last_logits(model, x)[:, 8:])  # so that pytest -k cannot notice it


# QK-norm --------------------------------------------------------------------------------------

GAINS = [f"transformer.h.{i}.attn.{name}_norm.weight" for i in range(3) for name in "qk"]


def test_qk_norm_adds_two_gains_of_one_dimension_to_each_block(qknorm):
    model = make(qknorm)
    head_dim = model.config.n_embd // model.config.n_head
    names_of_base = {name for name, _ in make(model_base).named_parameters()}
    added = {
        name: (tuple(p.shape), p.unique().tolist())
        for name, p in model.named_parameters()
        if name not in names_of_base
    }
    assert added == {name: ((head_dim,), [1]) for name in GAINS}
    assert list(model.buffers()) == []


def test_a_model_with_qk_norm_is_not_refused_by_training(qknorm):
    check_model(make(qknorm), TrainConfig(model="model_qknorm", optimizer="muon", fsdp=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gains_of_qk_norm_get_no_weight_decay_and_no_muon(optimizer, qknorm):
    model = make(qknorm)
    gains = {p for name, p in model.named_parameters() if name in GAINS}
    assert gains.isdisjoint(hidden_matrices(model))
    optimizers = make_optimizer(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
    adamw = optimizers.adamw if optimizer == "muon" else optimizers
    decay = {p: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {decay[p] for p in gains} == {0}


def test_the_scores_of_qk_norm_do_not_grow_with_the_weights(qknorm):
    attention = make(qknorm).transformer.h[0].attn
    large = copy.deepcopy(attention)
    C = attention.c_proj.in_features
    with torch.no_grad():
        attention.c_attn.weight[: 2 * C] *= 50  # q and k; eps is then too small to matter
        large.c_attn.weight[: 2 * C] *= 5000
    x = torch.randn(2, 7, C)
    close(large(x), attention(x))


@pytest.mark.parametrize("prompt", [1, 2, 15])
def test_qk_norm_decodes_the_logits_of_full_forward_passes(qknorm, prompt):
    model, x = make_vivid(qknorm), tokens(2, 16)
    cached = feed(model, model.make_cache(2), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    close(cached, last_logits(model, x)[:, prompt - 1 :])


def test_the_check_of_qk_norm_accepts_the_model(qknorm):
    exec(QKNORM_CHECK, {})


NORM_OF_K = "self.k_norm(k)"
QKNORM_MUTANTS = {
    "missing on q": {"self.q_norm(q)": "q + 0 * self.q_norm(q)"},
    "missing on k": {NORM_OF_K: f"k + 0 * {NORM_OF_K}"},
    "over all heads of a token": {
        NORM_OF_K: "self.k_norm.weight * k / (k.square().mean((1, 3), True) + 1e-5).sqrt()"
    },
    "over the tokens": {
        NORM_OF_K: "self.k_norm.weight * k / (k.square().mean(2, True) + 1e-5).sqrt()"
    },
    "centered": {NORM_OF_K: "F.layer_norm(k, k.shape[3:], self.k_norm.weight)"},
    "to length 1": {NORM_OF_K: "self.k_norm.weight * F.normalize(k, dim=3)"},
    "without the gain": {NORM_OF_K: "F.rms_norm(k, k.shape[3:], eps=1e-5)"},
    "the gain of q on k": {NORM_OF_K: "self.q_norm(k)"},
    "on v": {NORM_OF_K: f"{NORM_OF_K}; v = self.k_norm(v)"},
    "missing with a cache": {NORM_OF_K: f"k if cache is not None else {NORM_OF_K}"},
    "missing in decode": {NORM_OF_K: f"k if T == 1 else {NORM_OF_K}"},
    "missing in a chunk": {
        NORM_OF_K: f"k if T > 1 and cache is not None and cache.pos > 0 else {NORM_OF_K}"
    },
    "behind the cache only": {
        NORM_OF_K: "k",
        "(self.layer, k, v)": "(self.layer, k, v); k = self.k_norm(k)",
    },
    "before and behind the cache": {"(self.layer, k, v)": "(self.layer, k, v); k = self.k_norm(k)"},
    "behind the cache": {
        NORM_OF_K: "k",
        "y = self.attend(q, k, v)": "y = self.attend(q, self.k_norm(k), v)",
    },
}


def mutate(text, changes):
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", QKNORM_MUTANTS)
def test_the_check_of_qk_norm_refuses_a_wrong_idea(name, qknorm_source, import_mine):
    import_mine(mutate(qknorm_source, QKNORM_MUTANTS[name]), "model_qknorm")
    with pytest.raises(AssertionError):
        exec(QKNORM_CHECK, {})


@pytest.mark.parametrize("name", ["missing on k", "over all heads of a token", "on v"])
def test_a_wrong_norm_agrees_with_its_own_full_forward_passes(name, qknorm_source, import_mine):
    text = mutate(qknorm_source, QKNORM_MUTANTS[name])
    model, x = make_vivid(import_mine(text, "model_qknorm")), tokens(2, 16)
    cached = feed(model, model.make_cache(2), x[:, :5], x[:, 5:9], *x[:, 9:].split(1, dim=1))
    close(cached[:, 1:], last_logits(model, x)[:, 8:])  # so that pytest -k cannot notice it


# Other blocks of Python -----------------------------------------------------------------------


def test_the_lines_with_ids_print_the_loss_and_decode_what_is_generated(tiny_run, capsys):
    shutil.copytree(tiny_run, "out/quickstart")
    names = {}
    exec(block("python", "import generate\n"), names)
    loss, continuation = capsys.readouterr().out.split("\n", maxsplit=1)
    assert 1 < float(loss) < 6
    assert len(names["continuation"]) == 20
    assert continuation == names["tokenizer"].decode(names["continuation"]) + "\n"


# tokenizer, documents, vocab_size of the model; with one document, char has no <|endoftext|>
TOKENIZERS = {
    "byte, padded": ("byte", 1, 320),
    "char": ("char", 2, None),
    "char of one document, padded": ("char", 1, 64),
    "gpt2, padded": ("gpt2", 2, 50304),
}
SNIPPETS = {  # a part of a block of Python: whether it needs <|endoftext|>
    'from_pretrained("exported/shakespeare")\ntokenizer': False,
    "generate_text(model": False,
    "import generate\n": False,
    "own_text.jsonl": True,
}


@pytest.fixture(params=[*list(TOKENIZERS)[:-1], pytest.param("gpt2, padded", marks=GPT2.marks)])
def run_of_a_tokenizer(request, workdir, capsys):
    """A run out/quickstart and its exports, on a text with the prompts of the snippets."""
    name, documents, vocab_size = TOKENIZERS[request.param]
    for i in range(documents):
        Path(f"{i}.txt").write_text("To be, or not: def read(self):\n" * 60)
    prepare_data.main(["mine", "--input=?.txt", f"--tokenizer={name}", "--val_fraction=0.2"])
    Path("data/mine").rename("data/stdlib")
    sizes = {"block_size": 128, "batch_size": 1, "max_steps": 1, "eval_tokens": 128}
    if vocab_size:
        sizes["vocab_size"] = vocab_size
    train.main(arguments(dataset="stdlib", out_dir="out/quickstart", **sizes))
    export("out/quickstart", "exported/quickstart")
    shutil.copytree("exported/quickstart", "exported/shakespeare")
    capsys.readouterr()
    return request.param


def test_the_lines_about_text_run_for_every_tokenizer_that_they_name(run_of_a_tokenizer, capsys):
    for part, needs_endoftext in SNIPPETS.items():
        if needs_endoftext and run_of_a_tokenizer.startswith("char of one document"):
            continue
        exec(block("python", part), {})
        assert capsys.readouterr().out != ""


QUICKSTART = '["config/quickstart.py", "--max_steps=100", "--out_dir=out/short"]'


def test_the_lines_that_call_a_main_train_and_sample(workdir, capsys):
    code = block("python", "train.main")
    assert code.count(QUICKSTART) == 1  # which takes longer than a test should
    tiny = repr(arguments(max_steps=2, out_dir="out/short"))
    exec(code.replace(QUICKSTART, tiny), {})
    assert "def " in capsys.readouterr().out


def test_the_lines_that_call_a_main_print_its_error(workdir, capsys):
    code = block("python", "train.main")
    exec(code.replace(QUICKSTART, repr(arguments(n_embd=15))), {})
    printed = capsys.readouterr()
    assert "n_embd=15" in printed.out
    assert printed.err == ""


def test_generate_text_takes_the_options_of_sampling(tiny_run):
    model, meta = load_model("out/tiny")
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9}
    texts = [
        generate_text(
            model,
            get_tokenizer(meta),
            "def ",
            max_new_tokens=20,
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_converted_interleaved_rope_weights_give_the_same_scores():
    namespace = {}
    exec(block("python", "def to_half_split"), namespace)
    T, C, H = 5, 12, 2
    D = C // H
    x = torch.randn(T, C)
    frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)
    angles = torch.arange(T)[:, None] * frequencies  # (T, D/2)

    def rotate_interleaved(heads):
        """Rotate the pairs (2i, 2i + 1) as complex numbers."""
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        rotation = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(pairs * rotation).flatten(-2)

    def rotate_halves(heads):
        return model_rope.rotate(heads, angles.cos(), angles.sin())

    def scores(q, k, rotate):
        heads = [x @ weight.T + bias for weight, bias in (q, k)]  # (T, C) each
        q, k = (rotate(rows.unflatten(1, (H, D)).transpose(0, 1)) for rows in heads)
        return q @ k.mT  # (H, T, T)

    q, k = [(torch.randn(C, C), torch.randn(C)) for _ in range(2)]
    converted = [[namespace["to_half_split"](rows, H) for rows in part] for part in (q, k)]
    close(scores(*converted, rotate_halves), scores(q, k, rotate_interleaved))


# Watching a run -------------------------------------------------------------------------------


@pytest.fixture
def quickstart(tiny_run):
    """The finished tiny run as out/quickstart."""
    shutil.copytree(tiny_run, "out/quickstart")
    return Path("out/quickstart")


def test_the_number_that_the_page_adds_to_the_log_is_the_norm_of_the_weights(workdir, monkeypatch):
    page = (ROOT / "docs/RECIPES.md").read_text(encoding="utf-8")
    code = re.search(r'`"weight_norm": (.*?)`', page, re.DOTALL)[1]
    train_step = train.train_step

    def add_number(run):
        names = vars(train) | {"parameters": list(run.model.parameters())}
        return train_step(run) | {"weight_norm": eval(" ".join(code.split()), names)}

    monkeypatch.setattr(train, "train_step", add_number)
    train.main(arguments(max_steps=1))
    weights = load_model("out/tiny")[0].parameters()
    norm = sum(float(p.detach().square().sum()) for p in weights) ** 0.5
    assert read_log(Path("out/tiny"))[-1]["weight_norm"] == pytest.approx(norm, rel=1e-5)


def without_none(records):
    return [
        {name: value for name, value in record.items() if value is not None} for record in records
    ]


def test_the_csv_has_the_values_of_the_log(quickstart):
    exec(block("python", "csv.DictWriter"), {})
    with open("out/quickstart.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == (
        without_none(read_log(quickstart))
    )


def test_the_csv_of_pandas_has_the_values_of_the_log(quickstart):
    pandas = pytest.importorskip("pandas")
    exec(block("python", "import pandas"), {})
    written = pandas.read_csv("out/quickstart.csv").to_dict("records")
    for row, record in zip(written, read_log(quickstart), strict=True):
        for name, value in record.items():
            if value is not None:
                assert row[name] == pytest.approx(value)


# Experiments ----------------------------------------------------------------------------------


def test_the_names_to_extend_for_the_experiments_exist():
    assert "base" in runs.variants(runs.PRESETS["cpu"].run)
    # a model of the reader's needs a color, too
    assert len(extension.NAMES) < len(extension.LINE_COLORS)
