"""Generate text from GPT-2, from a run, or from a model in transformers' format.

    python sample.py --init_from=out/quickstart --prompt="def "
    python sample.py --init_from=gpt2 --prompt="The meaning of life is" --num_samples=3

All samples form one batch. One prefill processes the prompt for all of them; after that each new
token costs one forward pass over that token alone, thanks to the KV cache. Text goes to stdout, all
else to stderr. A single sample is printed while it is generated.

On a GPU, one sample is expected to wait for kernel launches, not for memory: a token of GPT-2 124M
takes about 200 of them, and 400 with RoPE, whether one sample or ten are generated (counted on a
stand-in for a GPU, not timed). So tokens per second should grow with --num_samples.
"""

import os
import sys
import time
from dataclasses import dataclass

# Decoding is many small products: let OpenMP threads spin longer between them. OpenMP reads this
# variable when torch is imported.
SPIN_COUNT = "100000"
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

import torch

from common.cpu import prepare_for_sampling
from common.device import (
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    use_cudnn_attention,
)
from common.errors import UserError, run_program
from common.pretrained import load_model
from common.tokenizer import TextStream, encode, get_tokenizer
from configurator import check_minimum, configure


@dataclass
class SampleConfig:
    # Model and prompt
    init_from: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, a directory, or a ckpt.pt
    prompt: str = ""  # text to continue; empty: start a document
    # How much
    num_samples: int = 1  # generated together, as one batch
    max_new_tokens: int = 500  # per sample; a sample ends earlier at <|endoftext|>
    stop: str | None = None  # text that ends a sample; it is not printed
    # How to choose
    temperature: float = 0.8  # divides the logits; 0: always the most likely token
    top_k: int | None = 200  # sample from the k most likely tokens
    top_p: float | None = None  # nucleus: the fewest tokens whose probabilities sum to p
    seed: int = 1337  # same seed, same text
    # Device
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32, bfloat16, float16; auto: bfloat16 where it is fast


def sample_next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token id per row of the logits (B, V): (B,) int64. Temperature 0 is greedy."""
    if temperature < 1e-6:  # dividing by it could overflow
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: dividing cannot overflow
    logits = logits / temperature
    if top_k is None or top_k >= logits.size(-1):
        ids = None
    else:
        logits, ids = logits.topk(top_k)  # (B, top_k): drawing from all V takes much longer
    if top_p is not None:
        logits = keep_nucleus(logits, top_p)
    token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)
    if ids is not None:
        token = ids.gather(1, token)
    return token.squeeze(1)


def keep_nucleus(logits, top_p):
    """Set all logits (B, V) to -inf, except those of the most likely tokens that reach top_p.

    Nucleus sampling (Holtzman et al. 2020, section 3.1): the token that crosses top_p is kept.
    """
    probabilities, ids = logits.softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # total of the more likely tokens
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, before >= top_p)
    removed.scatter_(1, ids[:, :1], False)  # keep the most likely token, however small top_p
    return logits.masked_fill(removed, -torch.inf)


@torch.inference_mode()
def generate(
    model, idx, max_new_tokens, num_samples=1, vocab_size=None, on_overflow=None, **sampling
):
    """Continue a prompt, idx (1, T), by num_samples samples; yield their next token ids (B,).

    idx           may be empty, (1, 0), for a model of load_model: it then starts a document
    vocab_size    ids from here on are never chosen; None: those of the padding of the vocabulary,
                  which load_model knows
    on_overflow   called once with a sentence when the text outgrows block_size
    sampling      temperature, top_k, top_p and generator of sample_next_token

    A model with learned positions ends at block_size: there, the last block_size // 2 tokens become
    its prompt. A rotary model continues. With sliding windows it does so in constant memory and
    time per token. Raises ValueError for a prompt that the model cannot continue, and for options
    out of range.
    """
    if idx.size(1) == 0 and hasattr(model, "start_token"):
        idx = torch.full((1, 1), model.start_token, device=idx.device)
    problem = option_problem(max_new_tokens, num_samples, **sampling)
    problem = problem or prompt_problem(model, idx, model.config.vocab_size)
    if problem:
        raise ValueError(problem)
    vocab_size = vocab_size or getattr(model, "n_vocab", None)
    has_learned_positions = "wpe" in model.transformer
    limit = model.config.block_size if has_learned_positions else float("inf")
    half = max(1, model.config.block_size // 2)
    recent = idx[:, -half:].expand(num_samples, -1)  # (B, at most half): the last tokens
    cache = model.make_cache(num_samples, min(limit, idx.size(1) + max_new_tokens))
    logits = model(idx, cache=cache)  # (1, 1, V): a batch of one fills the cache for all samples
    for made in range(1, max_new_tokens + 1):
        next_logits = logits[:, -1, :vocab_size].expand(num_samples, -1)  # (B, V)
        token = sample_next_token(next_logits, **sampling)
        yield token
        if made == max_new_tokens:
            return
        recent = torch.cat([recent, token[:, None]], dim=1)[:, -half:]
        if cache.pos < limit:
            logits = model(token[:, None], cache=cache)
            continue
        if on_overflow is not None:
            on_overflow(f"the text exceeds block_size={limit}: using its last {half} tokens")
            on_overflow = None
        cache = model.make_cache(num_samples, limit)
        logits = model(recent, cache=cache)


def option_problem(
    max_new_tokens, num_samples=1, temperature=1.0, top_k=None, top_p=None, generator=None
):
    """Return what is wrong with options of generate, or None."""
    for name, value in [("max_new_tokens", max_new_tokens), ("num_samples", num_samples)]:
        if value < 1:
            return f"{name}={value} must be at least 1"
    if not temperature >= 0:  # nor NaN
        return f"temperature={temperature} must be at least 0"
    if top_k is not None and top_k < 1:
        return f"top_k={top_k} must be at least 1; None turns it off"
    if top_p is not None and not 0 < top_p <= 1:
        return f"top_p={top_p} must be above 0 and at most 1; None turns it off"
    return None


def prompt_problem(model, idx, vocab_size):
    """Return why a model with vocab_size ids cannot continue a prompt, idx (1, T), or None."""
    T, block_size = idx.size(1), model.config.block_size
    if T == 0:
        return "the prompt has no tokens: give the id that begins a document, if there is one"
    if idx.size(0) != 1:
        return f"the prompt has {idx.size(0)} rows: num_samples continues one prompt several times"
    largest_id = int(idx.max())  # as a Python int: in uint8, vocab_size would wrap
    if largest_id >= vocab_size:
        return (
            f"the prompt has the token id {largest_id}, the model {vocab_size} ids: it was trained "
            "with another tokenizer, which a meta.json beside its weights can name"
        )
    if "wpe" in model.transformer and T > block_size:
        return f"the prompt has {T} tokens, more than block_size={block_size}"
    return None


def encode_prompt(model, tokenizer, prompt):
    """Return the token ids of a prompt (1, T); of an empty one <|endoftext|>, or 0 without that."""
    start_token = getattr(model, "start_token", tokenizer.eot_token or 0)
    ids = encode(tokenizer, prompt).tolist() or [start_token]
    return torch.tensor([ids], device=model.transformer.wte.weight.device)


def generate_text(model, tokenizer, prompt, max_new_tokens, **sampling):
    """Return a prompt and its continuation as text; `sampling` as in sample_next_token."""
    idx = encode_prompt(model, tokenizer, prompt)
    vocab_size = min(model.config.vocab_size, tokenizer.n_vocab)
    stream = TextStream(tokenizer)
    tokens = generate(model.eval(), idx, max_new_tokens, vocab_size=vocab_size, **sampling)
    pieces = [stream.add(token.item()) for token in tokens]
    return prompt + "".join(pieces) + stream.finish()


def check_config(config):
    """Raise UserError for invalid options."""
    check_minimum(config, 1, "num_samples", "max_new_tokens")
    check_minimum(config, 0, "temperature", "seed")
    problem = option_problem(
        config.max_new_tokens, config.num_samples, config.temperature, config.top_k, config.top_p
    )
    if config.stop == "":
        problem = "stop is empty: give the text that ends a sample"
    if problem:
        raise UserError(problem)


def load(config):
    """Return the model, on its device and in its dtype, and the tokenizer."""
    device = pick_device(config.device)
    keep_freed_memory(device)
    dtype = pick_dtype(config.dtype, device)
    model, meta = load_model(config.init_from)
    model.to(device, dtype)
    use_cudnn_attention(device, False)
    prepare_for_sampling(model, rows=config.num_samples)  # on a CPU
    return model, get_tokenizer(meta)


def print_samples(config):
    """Generate and print the samples that the options ask for."""
    model, tokenizer = load(config)
    idx = encode_prompt(model, tokenizer, config.prompt)
    problem = prompt_problem(model, idx, model.n_vocab)
    if problem:
        raise UserError(problem)
    streams = [TextStream(tokenizer, config.stop) for _ in range(config.num_samples)]
    tokens = generate(
        model,
        idx,
        config.max_new_tokens,
        config.num_samples,
        on_overflow=lambda text: print(f"\n[{text}]", file=sys.stderr),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(idx.device).manual_seed(config.seed),
    )
    print_streams(streams, tokens, config.prompt)


def print_streams(streams, tokens, prompt):
    """Print a single sample while it is generated, several at the end; then the speed."""
    is_single = len(streams) == 1
    texts = [[prompt] for _ in streams]  # in pieces
    if is_single:
        print(prompt, end="", flush=True)
    made, interrupted = 0, False
    begin = time.perf_counter()
    try:
        for token in tokens:
            made += sum(not stream.done for stream in streams)
            for stream, text, token_id in zip(streams, texts, token.tolist(), strict=True):
                text.append(stream.add(token_id))
            if is_single:
                print(texts[0][-1], end="", flush=True)
            if all(stream.done for stream in streams):
                break
    except KeyboardInterrupt:  # print what was generated so far
        interrupted = True
    seconds = time.perf_counter() - begin
    for stream, text in zip(streams, texts, strict=True):
        text.append(stream.finish())
    if is_single:
        print(texts[0][-1])
    else:
        print("\n---------------\n".join("".join(text) for text in texts))
    print(f"[{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s]", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt


def main(argv):
    """Print samples as the options in argv say. Raises UserError for what the user can fix.

    Can be called from Python, as in a notebook; there generate_text returns the text instead.
    """
    config = configure(SampleConfig, argv, __doc__)
    check_config(config)
    try:
        print_samples(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with num_samples={config.num_samples} and "
            f"max_new_tokens={config.max_new_tokens}: reduce either"
        ) from error


if __name__ == "__main__":
    run_program(main, sys.argv[1:], encoding="utf-8", errors="replace")
