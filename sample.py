"""Generate text from a run, from GPT-2, or from any model in transformers' GPT-2 format.

    python sample.py --init_from=out/quickstart --prompt="def "
    python sample.py --init_from=gpt2 --prompt="The meaning of life is" --num_samples=3 --temperature=0.8

All samples are one batch: the prompt is read once, then each new token costs one forward over it alone, thanks to the
key-value cache. Text goes to stdout, everything else to stderr; a single sample is shown while it is made.
"""

import codecs
import os
import sys
import time
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py

import torch

from common.device import is_out_of_memory, keep_freed_memory, pick_device, pick_dtype
from common.errors import UserError, program
from common.pretrained import load_model
from common.tokenizer import encode, get_tokenizer
from configurator import check_range, configure


@dataclass
class SampleConfig:
    # Model and prompt
    init_from: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run, a checkpoint, a transformers directory
    prompt: str = ""  # text to continue; empty: begin a document
    # How much
    num_samples: int = 1  # samples, made together
    max_new_tokens: int = 500  # tokens in each, at most; a sample also ends at <|endoftext|>
    stop: str | None = None  # text that ends a sample; it is not printed
    # How to choose
    temperature: float = 0.8  # divides the logits; 0: always the likeliest token
    top_k: int | None = 200  # choose among so many of the likeliest
    top_p: float | None = None  # choose among the likeliest that together have this probability
    seed: int = 1337  # same seed, same text
    # Machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32, bfloat16, float16; auto: bfloat16 where the hardware is fast at it


def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token id for each row of the logits (B, V); returns (B,) int64. Temperature 0 takes the likeliest."""
    if temperature < 1e-6:  # so near to 0 that the division would overflow
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no temperature overflows
    if top_k is not None and top_k < logits.size(-1):
        values, ids = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids, values)
    if top_p is not None:  # nucleus sampling (Holtzman et al. 2020, section 3.1): the token that crosses top_p is in
        ordered, ids = logits.softmax(dim=-1).sort(descending=True)
        out = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, ids, out), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, num_samples=1, vocab_size=None, note=lambda text: None, **how):
    """Continue a prompt (1, T) by num_samples samples; yields (num_samples,) token ids at a time.

    vocab_size   ids from here on are padding, and never chosen
    note         told in a sentence when the text outgrows the context
    how          temperature, top_k, top_p and generator, as for choose()

    A model with learned positions ends at block_size: from there, the last block_size // 2 tokens become its prompt.
    With rotary positions a text goes on; with sliding windows too, in constant memory and constant time per token.
    ValueError for a prompt that is empty or longer than the context.
    """
    if idx.size(1) == 0:
        raise ValueError("the prompt has no tokens")
    positions = model.config.block_size if "wpe" in model.transformer else float("inf")
    half = max(1, model.config.block_size // 2)
    text = idx[:, -half:].expand(num_samples, -1)  # (B, at most half), the last tokens
    cache = model.make_cache(num_samples, min(positions, idx.size(1) + max_new_tokens))
    logits = model(idx, cache=cache)  # (1, 1, V): a batch of one fills the cache for all samples
    noted = False
    for made in range(1, max_new_tokens + 1):
        token = choose(logits[:, -1, :vocab_size].expand(num_samples, -1), **how)
        yield token
        if made == max_new_tokens:
            return
        text = torch.cat([text, token[:, None]], dim=1)[:, -half:]
        if cache.pos == positions:
            if not noted:
                note(f"the text passes block_size={positions}: the model goes on with the last {half} tokens")
            noted = True
            cache = model.make_cache(num_samples, positions)
            logits = model(text, cache=cache)
        else:
            logits = model(token[:, None], cache=cache)


class Sample:
    """The text of one sample, token by token: whole characters only, up to a stop string or <|endoftext|>."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.done = "", False  # held: an end that may become the stop string

    def add(self, id):
        """Take a token; returns the text that it makes certain. Tokens after the end are ignored."""
        if self.done or id == self.tokenizer.eot_token:
            return self.finish()
        text = self.held + self.decoder.decode(self.tokenizer.decode_single_token_bytes(id))
        if self.stop and self.stop in text:
            self.held, self.done = "", True
            return text[: text.index(self.stop)]
        lengths = range(min(len(self.stop or ""), len(text)), 0, -1)
        self.held = next((text[-n:] for n in lengths if self.stop.startswith(text[-n:])), "")
        return text[: len(text) - len(self.held)]

    def finish(self):
        """No more tokens come; returns what was held. What is left of an unfinished character becomes U+FFFD."""
        rest = "" if self.done else self.held + self.decoder.decode(b"", final=True)
        self.held, self.done = "", True
        return rest


def check(config):
    """UserError for a SampleConfig that makes no sense."""
    check_range(config, 1, "num_samples", "max_new_tokens", "top_k")
    check_range(config, 0, "temperature", "seed")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UserError(f"top_p={config.top_p} must be above 0 and at most 1")
    if config.stop == "":
        raise UserError("stop is empty: name the text that ends a sample")


def write(config):
    """Print the samples that a SampleConfig asks for."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, meta = load_model(config.init_from)
    model.to(device, dtype).eval()
    tokenizer = get_tokenizer(meta)
    ids = encode(tokenizer, config.prompt).tolist()
    if not ids:
        ids = [0 if tokenizer.eot_token is None else tokenizer.eot_token]
    vocab_size = min(meta["vocab_size"], tokenizer.n_vocab)  # beyond is padding
    if max(ids) >= vocab_size:
        raise UserError(
            f"the prompt has the token id {max(ids)}, the model {vocab_size} ids: its tokenizer is not "
            f"{meta['tokenizer']}; a meta.json in {config.init_from} can name it"
        )
    if "wpe" in model.transformer and len(ids) > model.config.block_size:
        raise UserError(f"the prompt has {len(ids)} tokens, more than the context of {model.config.block_size}")
    samples = [Sample(tokenizer, config.stop) for _ in range(config.num_samples)]
    stream = config.num_samples == 1
    texts = [[config.prompt] for _ in samples]  # in pieces
    if stream:
        print(config.prompt, end="", flush=True)
    made = 0
    begun = time.perf_counter()
    tokens = generate(
        model,
        torch.tensor([ids], device=device),
        config.max_new_tokens,
        config.num_samples,
        vocab_size=vocab_size,
        note=lambda text: print(f"\n[{text}]", file=sys.stderr),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    interrupted = False
    try:
        for token in tokens:
            made += sum(not sample.done for sample in samples)
            for sample, text, id in zip(samples, texts, token.tolist(), strict=True):
                piece = sample.add(id)
                if stream:
                    print(piece, end="", flush=True)
                else:
                    text.append(piece)
            if all(sample.done for sample in samples):
                break
    except KeyboardInterrupt:  # what there is is shown
        interrupted = True
    seconds = time.perf_counter() - begun
    if stream:
        print(samples[0].finish())
    else:
        ends = [sample.finish() for sample in samples]
        print("\n---------------\n".join("".join(text) + end for text, end in zip(texts, ends, strict=True)))
    print(f"[{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s]", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt


@program
def main(argv):
    config = configure(SampleConfig, argv, __doc__)
    check(config)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    keep_freed_memory()
    try:
        write(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = f"num_samples={config.num_samples} and max_new_tokens={config.max_new_tokens}"
        raise UserError(f"out of memory with {asked}: use less of either") from error


if __name__ == "__main__":
    main(sys.argv[1:])
