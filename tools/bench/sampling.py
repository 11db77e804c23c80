"""Sampling: tokens per second of generate(), and the time of one decode step of the variants.

The models have the size of GPT-2 small, 124M parameters, and random weights.
"""

import functools
import importlib.util
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

import sample
from common.cpu import prepare_for_sampling
from common.device import keep_freed_memory, use_cudnn_attention
from common.models import model_module
from tools.bench.limits import bandwidth, fastest_reader
from tools.bench.nanogpt import copy_given_nanogpt, generating_seconds
from tools.bench.sizes import dtype_name, dtypes
from tools.results.turns import (
    compare,
    milliseconds,
    ratio,
    run_in_new_process,
    split,
    spread,
    stopwatch,
)

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


def generating_rows(bench, dtype, streams, deadline, reader, programs, with_transformers):
    """Return one row per contestant for a number of streams in one dtype."""
    device, new_tokens = bench.device, bench.sizes.streams[streams]
    model, bytes_read = sampling_model(bench, "model", dtype, streams)
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None]
    generators = {"ours": (our_contestant, model)}
    if with_transformers:
        generators["transformers"] = (transformers_contestant, transformers_model(bench, dtype))
    contestants = {"read": reader}
    for name, generator in generators.items():
        contestants[name] = stopwatch(device, *generator, prompt, streams, new_tokens)
        contestants[name, "first"] = stopwatch(device, *generator, prompt, streams, 1)
    times = compare(deadline, contestants, programs)
    read_limit = new_tokens * bytes_read / bandwidth(bench, times.pop("read"))
    first_tokens = {name: times.pop((name, "first")) for name in generators}
    rows = []
    for name, values in times.items():
        row = {"streams": streams, "dtype": dtype_name(dtype), "contestant": name}
        row["tokens_per_second"] = spread([streams * new_tokens / t for t in values])
        is_timed = name in first_tokens  # nanoGPT's program is not
        row["first_token_ms"] = milliseconds(first_tokens[name]) if is_timed else None
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

    Each time includes the prefill of a short prompt; "first_token_ms" is the time of that and of
    the first token alone. "of_read_limit" compares with the time in which the weights alone could
    be read from memory, once per decode step.
    """
    return in_process_of_sample(sample_rows, bench)


def sample_rows(bench):
    """Return the rows of measure_sample, and notes."""
    keep_freed_memory(bench.device)  # as sample.py
    reader = fastest_reader(bench)
    with_transformers = has_transformers(bench)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_given_nanogpt(bench, folder)
        cases = list(itertools.product(dtypes(bench.device), bench.sizes.streams))
        deadlines = split(bench.deadline, [1] * len(cases))
        for (dtype, streams), deadline in zip(cases, deadlines, strict=True):
            programs = {}
            # nanoGPT samples in float32, one stream after another: one comparison is enough.
            if copy is not None and (dtype, streams) == (torch.float32, 1):
                new_tokens = bench.sizes.streams[streams]
                options = (bench.sizes.sampled_model, bench.device, PROMPT_TOKENS, new_tokens)
                programs["nanoGPT"] = functools.partial(generating_seconds, copy, *options)
            arguments = (bench, dtype, streams, deadline, reader, programs, with_transformers)
            rows += generating_rows(*arguments)
    return rows, bench.notes


# Decode --------------------------------------------------------------------------------------

PREFILL_CHUNK = 1024  # tokens


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


@dataclass
class Decoding:
    """A model that decodes: contestants, and what a step reads."""

    step: Callable  # one token of each sample
    first_token: Callable  # prefills the cache, as many tokens as the step's position
    cache_bytes: int
    bytes_read: float  # by a step: the weights, and all keys and values in the cache


def make_decoding(bench, dtype, name, streams, position):
    """Return the Decoding of a model: so many samples, at a position."""
    model, bytes_read = sampling_model(bench, name, dtype, streams)
    cache = model.make_cache(streams, None if "wpe" in model.transformer else position + 1)
    step = make_decode_step(model, cache, position)
    bytes_read += cache.nbytes * min(1, position / cache.k.size(3))

    def first_token():
        cache.pos = 0
        fill_cache(model, cache, position)

    device = bench.device
    return Decoding(
        stopwatch(device, step), stopwatch(device, first_token), cache.nbytes, bytes_read
    )


def measure_decode(bench):
    """Return rows with the milliseconds of a decode step and the bytes of the KV cache.

    The models are compared for several numbers of samples. There "first_token_ms" is the time of
    the prefill of a prompt that ends where the step is.
    """
    return in_process_of_sample(decode_rows, bench)


def decode_rows(bench):
    """Return the rows of measure_decode, and notes."""
    keep_freed_memory(bench.device)  # as sample.py
    rows = []
    reader = fastest_reader(bench)
    kinds, batches = dtypes(bench.device), bench.sizes.decode_batches
    deadlines = split(bench.deadline, [1] * len(kinds) * (1 + len(batches)))
    for dtype in kinds:
        rows += decode_positions(bench, dtype, next(deadlines), reader)
        for streams in batches:
            rows += decode_models(bench, dtype, streams, next(deadlines), reader)
    return rows, bench.notes


def decode_positions(bench, dtype, deadline, reader):
    """Return two rows: model_rope_gqa_swa at position = window and at a far position."""
    name = "model_rope_gqa_swa"
    window = model_module(name).GPTConfig(**bench.sizes.sampled_model).window
    near, far = (name, 1, window), (name, 1, bench.position)
    made = {case: make_decoding(bench, dtype, *case) for case in (near, far)}
    times, rows = time_decode_steps(bench, dtype, deadline, reader, made)
    for case, row in rows.items():
        row["this_over_window"] = ratio(times[case], times[near])
    return [bench.show(row) for row in rows.values()]


def decode_models(bench, dtype, streams, deadline, reader):
    """Return one row per model: a decode step of some samples, KV heads and windows compared."""
    names = ("model", "model_gqa", "model_swa")
    cases = [(name, streams, bench.sizes.decode_position) for name in names]
    made = {case: make_decoding(bench, dtype, *case) for case in cases}
    deadlines = split(deadline, [3, 1])
    times, rows = time_decode_steps(bench, dtype, next(deadlines), reader, made)
    prefills = {case: decoding.first_token for case, decoding in made.items()}
    first_tokens = compare(next(deadlines), prefills)
    for case, row in rows.items():
        row["model_over_this"] = ratio(times[cases[0]], times[case])
        row["first_token_ms"] = milliseconds(first_tokens[case])
    return [bench.show(row) for row in rows.values()]


def time_decode_steps(bench, dtype, deadline, reader, made):
    """Return {case: seconds of each round} and {case: row} of decode steps.

    made   {case: Decoding}; a case is (model, streams, position)
    """
    contestants = {case: decoding.step for case, decoding in made.items()}
    times = compare(deadline, contestants | {"read": reader})
    rows = {}
    for case, decoding in made.items():
        name, streams, position = case
        row = {"dtype": dtype_name(dtype), "model": name, "batch": streams, "position": position}
        row |= {"cache_bytes": decoding.cache_bytes, "ms": milliseconds(times[case])}
        read_limit = decoding.bytes_read / bandwidth(bench, times["read"])
        row["of_read_limit"] = ratio([read_limit], times[case])
        rows[case] = row
    return times, rows
