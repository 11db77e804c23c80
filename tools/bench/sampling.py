"""Sampling: tokens per second of generate(), and the time of one decode step of the variants.

The models have the size of GPT-2 small, 124M parameters, and random weights.
"""

import functools
import importlib.util
import itertools
import os
import statistics
import tempfile

import torch

import sample
from common.cpu import prepare_for_sampling
from common.device import keep_freed_memory, use_cudnn_attention
from common.models import model_module
from tools.bench.limits import bandwidth, fastest_reader
from tools.bench.nanogpt import copy_given_nanogpt, generating_seconds
from tools.bench.sizes import dtype_name, dtypes
from tools.results.turns import compare, milliseconds, ratio, run_in_new_process, spread, stopwatch

# Generating ----------------------------------------------------------------------------------

PROMPT_TOKENS = 16


def sampling_model(bench, name, dtype, rows):
    """Return a model of GPT-2 small's size with random weights, and the bytes of the weights read.

    On a CPU its layers are packed for so many rows, as by sample.py. A decode step reads all
    weights but the position embeddings.
    """
    module = model_module(name)
    model = module.GPT(module.GPTConfig(**bench.sizes.sampled_model))
    model = model.to(bench.device, dtype).eval()
    weights = [p for name, p in model.named_parameters() if not name.endswith("wpe.weight")]
    bytes_read = sum(p.nbytes for p in weights)
    use_cudnn_attention(bench.device, False)  # as sample.py
    prepare_for_sampling(model, rows)
    return model, bytes_read


def our_contestant(model, prompt, streams, new_tokens):
    """Generate greedily with our generate(): what sample.py does, without text."""
    tokens = sample.generate(model, prompt, new_tokens, num_samples=streams, temperature=0)
    for _ in tokens:
        pass


def transformers_model(bench, dtype):
    """Return transformers' GPT-2 of the same size with random weights."""
    import transformers

    ours = model_module("model").GPTConfig(**bench.sizes.sampled_model)
    config = transformers.GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=ours.block_size,
        n_layer=ours.n_layer,
        n_head=ours.n_head,
        n_embd=ours.n_embd,
        bos_token_id=None,
        eos_token_id=None,  # no sample ends early
    )
    return transformers.GPT2LMHeadModel(config).to(bench.device, dtype).eval()


def transformers_contestant(model, prompt, streams, new_tokens):
    """Generate greedily with transformers' generate()."""
    model.generate(
        prompt.expand(streams, -1),
        attention_mask=torch.ones(streams, prompt.size(1), device=prompt.device),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


def has_transformers(bench):
    """Return whether transformers is installed; if not, say that it is skipped."""
    if importlib.util.find_spec("transformers") is not None:
        return True
    bench.note("transformers is skipped: it is not installed")
    return False


def generating_rows(bench, dtype, streams, reader, programs, with_transformers):
    """Return one row per contestant for a number of streams in one dtype."""
    device, new_tokens = bench.device, bench.sizes.streams[streams]
    model, bytes_read = sampling_model(bench, "model", dtype, streams)
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None]
    arguments = (prompt, streams, new_tokens)
    contestants = {"ours": stopwatch(device, our_contestant, model, *arguments), "read": reader}
    if with_transformers:
        peer = transformers_model(bench, dtype)
        contestants["transformers"] = stopwatch(device, transformers_contestant, peer, *arguments)
    seconds = bench.seconds / (len(dtypes(device)) * len(bench.sizes.streams))
    times = compare(seconds, contestants, programs)
    read_limit = new_tokens * bytes_read / bandwidth(bench, times.pop("read"))
    rows = []
    for name, values in times.items():
        row = {"streams": streams, "dtype": dtype_name(dtype), "contestant": name}
        row["tokens_per_second"] = spread([streams * new_tokens / t for t in values])
        for peer in times:
            if peer != "ours":
                row[f"{peer.lower()}_over_this"] = ratio(times[peer], values)
        row["of_read_limit"] = read_limit / statistics.median(values)
        rows.append(bench.show(row))
    return rows


def in_process_of_sample(measure, bench):
    """Return the rows that measure(bench) returns in a process with sample.py's OpenMP setting."""
    before = os.environ["GOMP_SPINCOUNT"]
    os.environ["GOMP_SPINCOUNT"] = sample.SPIN_COUNT
    try:
        rows, bench.notes = run_in_new_process(measure, bench)
    finally:
        os.environ["GOMP_SPINCOUNT"] = before
    return rows


def measure_sample(bench):
    """Return rows with the tokens per second of one stream and of several, in each dtype.

    Each time includes the prefill of a short prompt. "of_read_limit" compares with the time in
    which the weights alone could be read from memory, once per decode step.
    """
    return in_process_of_sample(sample_rows, bench)


def sample_rows(bench):
    """Return the rows of measure_sample, and notes."""
    keep_freed_memory()  # as sample.py
    reader = fastest_reader(bench)
    with_transformers = has_transformers(bench)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_given_nanogpt(bench, folder)
        for dtype, streams in itertools.product(dtypes(bench.device), bench.sizes.streams):
            programs = {}
            # nanoGPT samples in float32, one stream after another: one comparison is enough.
            if copy is not None and (dtype, streams) == (torch.float32, 1):
                new_tokens = bench.sizes.streams[streams]
                options = (bench.sizes.sampled_model, bench.device, PROMPT_TOKENS, new_tokens)
                programs["nanoGPT"] = functools.partial(generating_seconds, copy, *options)
            rows += generating_rows(bench, dtype, streams, reader, programs, with_transformers)
    return rows, bench.notes


# Decode --------------------------------------------------------------------------------------

PREFILL_CHUNK = 1024  # tokens
SAMPLES = 10  # streams of the comparison between models


@torch.inference_mode()
def fill_cache(model, cache, length):
    """Prefill a cache with random tokens up to `length` of them, in chunks."""
    while cache.pos < length:
        size = (1, min(PREFILL_CHUNK, length - cache.pos))
        model(torch.randint(model.config.vocab_size, size, device=cache.k.device), cache=cache)


def make_decode_step(model, cache, position):
    """Return a function that decodes one token of each sample, always at the same position."""
    window = getattr(model.config, "window", position)
    fill_cache(model, cache, min(position, window))  # a ring buffer holds no more than the window
    samples = cache.k.size(1)
    token = torch.zeros(samples, 1, dtype=torch.int64, device=cache.k.device)

    @torch.inference_mode()
    def step():
        cache.pos = position
        model(token, cache=cache)

    return step


def decode_contestant(bench, dtype, name, streams, position):
    """Return a contestant that decodes, the bytes of its KV cache, and the bytes that a step reads.

    A step reads the weights, and all keys and values in the cache.
    """
    model, bytes_read = sampling_model(bench, name, dtype, streams)
    cache = model.make_cache(streams, None if "wpe" in model.transformer else position + 1)
    step = make_decode_step(model, cache, position)
    bytes_read += cache.nbytes * min(1, position / cache.k.size(3))
    return stopwatch(bench.device, step), cache.nbytes, bytes_read


def measure_decode(bench):
    """Return rows with the milliseconds of a decode step and the bytes of the KV cache."""
    return in_process_of_sample(decode_rows, bench)


def decode_rows(bench):
    """Return the rows of measure_decode, and notes."""
    keep_freed_memory()  # as sample.py
    rows = []
    reader = fastest_reader(bench)
    kinds = dtypes(bench.device)
    for dtype in kinds:
        seconds = bench.seconds / (2 * len(kinds))
        rows += decode_positions(bench, dtype, seconds, reader)
        rows += decode_models(bench, dtype, seconds, reader)
    return rows, bench.notes


def decode_positions(bench, dtype, seconds, reader):
    """Return two rows: model_rope_gqa_swa at position = window and at a far position."""
    name = "model_rope_gqa_swa"
    window = model_module(name).GPTConfig(**bench.sizes.sampled_model).window
    near, far = (name, 1, window), (name, 1, bench.position)
    times, rows = time_decode_steps(bench, dtype, seconds, reader, [near, far])
    for case, row in rows.items():
        row["this_over_window"] = ratio(times[case], times[near])
    return [bench.show(row) for row in rows.values()]


def decode_models(bench, dtype, seconds, reader):
    """Return one row per model: a decode step of several samples, KV heads and windows compared."""
    names = ("model", "model_gqa", "model_swa")
    cases = [(name, SAMPLES, bench.sizes.samples_position) for name in names]
    times, rows = time_decode_steps(bench, dtype, seconds, reader, cases)
    for case, row in rows.items():
        row["model_over_this"] = ratio(times[cases[0]], times[case])
    return [bench.show(row) for row in rows.values()]


def time_decode_steps(bench, dtype, seconds, reader, cases):
    """Return {case: seconds of each round} and {case: row} of decode steps.

    A case is (model, streams, position).
    """
    made = {case: decode_contestant(bench, dtype, *case) for case in cases}
    contestants = {case: turn for case, (turn, *_) in made.items()}
    times = compare(seconds, contestants | {"read": reader})
    rows = {}
    for case, (_, cache_bytes, bytes_read) in made.items():
        name, streams, position = case
        row = {"dtype": dtype_name(dtype), "model": name, "batch": streams, "position": position}
        row |= {"cache_bytes": cache_bytes, "ms": milliseconds(times[case])}
        read_limit = bytes_read / bandwidth(bench, times["read"])
        row["of_read_limit"] = ratio([read_limit], times[case])
        rows[case] = row
    return times, rows
