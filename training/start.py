"""How a run starts: read and check its options; resume it, load weights, or start from scratch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import run_dir
from common.distributed import ProcessGroup
from common.errors import UserError
from common.models import make_config, model_module, models_with_option
from common.pretrained import load_model
from configurator import check_minimum, configure_with_model
from training.optimizer import OPTIMIZERS
from training.tracker import TRACKERS

MAX_TIMEOUT = 10**7  # seconds, four months

# Options that may change when a run is resumed: they say when something is saved or printed, or how
# the same global batch is computed. The results stay equal up to rounding, with two exceptions:
# max_steps stretches the learning rate schedule, and with dropout > 0 the masks depend on the rank
# and on batch_size.
RESUMABLE_CHANGES = {
    "out_dir",
    "overwrite",
    "allow_changes",
    "eval_only",
    "batch_size",
    "max_steps",
    "eval_interval",
    "eval_train",
    "tracker",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "device",
    "compile",
    "activation_checkpointing",
    "deterministic",
    "fsdp",
    "shard_degree",
    "dist_timeout",
}
# Options that may also change with --allow_changes=True: each step reads them again. All others are
# refused. dtype is stored as chosen; if "auto" would choose another one here, give --dtype. The
# table in docs/RELIABILITY.md has all options.
ALLOWED_CHANGES = {
    "learning_rate",
    "muon_learning_rate",
    "min_lr",
    "warmup_steps",
    "lr_schedule",
    "weight_decay",
    "grad_clip",
    "dropout",
    "eval_tokens",
}

# Options --------------------------------------------------------------------------------------


def read_options(options, argv, doc):
    """Collective. Return train.py's options, the model's that were given, and the process group.

    options   the dataclass of train.py's options
    doc       text that --help prints before them

    Every rank reads the options; one error is printed if they are wrong.
    """
    config = error = None
    try:
        config, model_options = configure_with_model(
            options,
            argv,
            doc,
            model_config=lambda config: model_module(config.model).GPTConfig,
            hint=models_with_option,  # for the error about an unknown option
        )
        check_minimum(config, 1, "dist_timeout")
        if config.dist_timeout > MAX_TIMEOUT:
            raise UserError(f"dist_timeout={config.dist_timeout} must be at most {MAX_TIMEOUT}")
        config.out_dir = config.out_dir or default_out_dir(argv)
        timeout = config.dist_timeout
    except UserError as wrong:
        error, timeout = wrong, 60
    group = ProcessGroup(timeout)
    with group.exit_together():
        if error is not None:
            raise error
    if group.restarted:
        config.overwrite = False  # torchrun restarted this worker: out_dir holds this very run
    return config, model_options, group


def default_out_dir(argv):
    """Return out/ and the stems of the config files, and the model if the command line names one.

    Without a config file it is out/default.
    """
    names = [Path(arg).stem for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    names = names or ["default"]
    names += [arg.partition("=")[2] for arg in argv if arg.startswith("--model=")]
    return "out/" + "-".join(names)


def check_options(config, model_options, group):
    """Raise UserError for options that are invalid, or inconsistent with the world size."""
    if config.init_from == "scratch":  # else the weights decide what is missing here
        make_config(model_module(config.model), model_options)
    check_minimum(config, 1, "batch_size", "total_batch_size", "max_steps")
    check_minimum(config, 1, "eval_interval", "eval_tokens", "log_interval")
    check_minimum(config, 1, "checkpoint_interval", "keep_checkpoints")
    check_minimum(config, 0, "seed", "learning_rate", "muon_learning_rate", "min_lr")
    check_minimum(config, 0, "warmup_steps", "weight_decay", "grad_clip", "shard_degree")
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer={config.optimizer} must be {' or '.join(OPTIMIZERS)}")
    if config.min_lr > config.learning_rate:
        raise UserError(
            f"min_lr={config.min_lr} must not exceed learning_rate={config.learning_rate}"
        )
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} must be at least 0 and below 1")
    if config.lr_schedule not in ("cosine", "wsd"):
        raise UserError(f"lr_schedule={config.lr_schedule} must be cosine or wsd")
    if config.tracker is not None and config.tracker not in TRACKERS:
        raise UserError(f"tracker={config.tracker} must be {' or '.join(TRACKERS)}")
    if config.compile not in (True, False, "auto"):
        raise UserError(f"compile={config.compile} must be auto, True or False")
    if config.fsdp and not group.launched:
        raise UserError(
            "fsdp=True needs torchrun: torchrun --standalone --nproc_per_node=2 train.py ..."
        )
    if config.fsdp and config.dtype == "float16":
        raise UserError("dtype=float16 does not work with fsdp=True: use bfloat16 or float32")
    if config.shard_degree and not config.fsdp:
        raise UserError(f"shard_degree={config.shard_degree} needs --fsdp=True; DDP does not shard")
    if config.shard_degree and group.world_size % config.shard_degree:
        raise UserError(
            f"shard_degree={config.shard_degree} must divide the number of processes, "
            f"{group.world_size}"
        )


def check_batch(config, block_size, world_size):
    """Raise UserError if an optimizer step is not a whole number of micro-steps."""
    tokens = config.batch_size * block_size * world_size  # of one micro-step on all ranks
    if config.total_batch_size % tokens == 0:
        return
    lower = config.total_batch_size // tokens * tokens
    nearest = [str(n) for n in (lower, lower + tokens) if n > 0]
    remedy = f"the nearest is {' or '.join(nearest)}"
    smaller = smaller_batch_size(config, block_size, world_size)
    if smaller and config.total_batch_size % (block_size * world_size) == 0:
        remedy = f"--batch_size={smaller} keeps it; else {remedy}"
    names = "batch_size x block_size"
    numbers = f"{config.batch_size} x {block_size}"
    if world_size > 1:
        names += " x processes"
        numbers += f" x {world_size}"
    raise UserError(
        f"total_batch_size={config.total_batch_size} is not a multiple of {names} = "
        f"{numbers} = {tokens}: {remedy}"
    )


def smaller_batch_size(config, block_size, world_size):
    """Return the largest batch_size below config.batch_size that divides a step; None if none."""
    sequences = config.total_batch_size // block_size // world_size  # per rank and step
    largest = min(config.batch_size - 1, sequences)
    return next((n for n in range(largest, 0, -1) if sequences % n == 0), None)


# Resume or begin ------------------------------------------------------------------------------


@dataclass
class Start:
    """What a run starts from: its last checkpoint or, for a new run, weights."""

    model_config: dict  # fields of the model's GPTConfig
    checkpoint: Path | None = None  # to resume from; None for a new run
    record: dict | None = None  # what the checkpoint's config.json says about the run
    best_loss: float = float("inf")  # lowest validation loss of the run's checkpoints
    weights: dict | None = None  # the state dict of a new model, on rank 0 only


def choose_start(config, model_options, meta, group):
    """Collective. Return the Start that rank 0 chooses.

    config          train.py's options, with the dtype that "auto" stands for
    model_options   those of the model that were given
    meta            the dataset's meta.json: tokenizer, vocab_size, and more
    """
    start = weights = None
    path = record = None
    overwrite = group.broadcast(config.overwrite)  # every rank must take the same branch
    if not overwrite:
        path, record = run_dir.checkpoint_to_resume(config.out_dir, not config.eval_only, group)
    with group.exit_together():
        if group.rank == 0 and path is not None:
            start = start_from_checkpoint(config, model_options, meta, path, record)
        if group.rank == 0 and start is None:
            model = new_model(config, model_options, meta)
            start, weights = Start(asdict(model.config)), model.state_dict()
    start = group.broadcast(start)
    start.weights = weights  # not broadcast here: load_initial_weights or DDP sends them
    return start


def start_from_checkpoint(config, model_options, meta, path, record):
    """Return the Start from a checkpoint, or None if eval_only asks for other weights (init_from).

    Raises UserError if it is of another run: one with other options or another model.
    """
    asks_for_other_weights = config.init_from not in ("scratch", record["options"]["init_from"])
    if config.eval_only and asks_for_other_weights:  # evaluate them, GPT-2's for example
        return None
    if config.init_from == "scratch":
        module = model_module(config.model)
        model_config = asdict(make_config(module, with_vocab_size(model_options, meta)))
    else:
        # Options that are not given were taken from the weights when the run began.
        model_config = record["model_config"] | model_options
    # Options added since the run began take their defaults.
    record["options"] = asdict(type(config)()) | record["options"]
    check_same_options(config, model_config, record)
    if record["options"]["eval_tokens"] != config.eval_tokens:
        for name in ("val_loss", "val_bits_per_byte", "train_eval_loss"):  # of other tokens
            record["metrics"].pop(name, None)
    best = run_dir.best_checkpoints(config.out_dir)
    _, best_loss = best.get(config.eval_tokens, (None, float("inf")))
    return Start(model_config, path, record, best_loss)


def new_model(config, model_options, meta):
    """Return the model of a new run, on the CPU: initialized, or with the weights of init_from."""
    vocab_size = model_options.get("vocab_size", meta["vocab_size"])
    if vocab_size < meta["vocab_size"]:
        raise UserError(
            f"vocab_size={vocab_size} is below the {meta['vocab_size']} of data/{config.dataset}"
        )
    if config.init_from == "scratch":
        module = model_module(config.model)
        model_config = make_config(module, with_vocab_size(model_options, meta))
        fields = asdict(model_config)
        torch.manual_seed(config.seed)
        model = module.GPT(model_config)
        check_storable(config.model, fields, asdict(model.config))
        return model
    model, source_meta = load_model(config.init_from, config.model, model_options)
    if source_meta["tokenizer"] != meta["tokenizer"]:
        raise UserError(
            f"{config.init_from} was trained with the tokenizer {source_meta['tokenizer']}, "
            f"data/{config.dataset} has {meta['tokenizer']}"
        )
    if source_meta.get("chars") != meta.get("chars"):
        raise UserError(
            f"{config.init_from} was trained with a char tokenizer of other characters than "
            f"data/{config.dataset}"
        )
    return model


def check_storable(name, fields, model_config):
    """Raise UserError if JSON changes a field of GPTConfig, or GPT has: it could not be resumed.

    fields         those of the GPTConfig before the model was built
    model_config   those after it
    """
    stored = json.loads(json.dumps(model_config, default=str))
    for field, value in fields.items():
        if stored[field] != value:
            raise UserError(
                f"{name}.py: {field}={value!r} would be {stored[field]!r} in a checkpoint: use "
                "int, float, bool, str, None or a list, and do not change the config in GPT"
            )


def with_vocab_size(model_options, meta):
    """Return the model options with the vocabulary size of the data, unless they have one."""
    return {"vocab_size": meta["vocab_size"]} | model_options


def check_same_options(config, model_config, record):
    """Raise UserError if options or model differ from the run's in a way that is not allowed.

    Prints the differences that are allowed.

    record   the record of the run's checkpoint
    """
    before = record["options"] | record["model_config"]
    changes = {
        name: f"{name} was {before.get(name)}, is {value}"
        for name, value in (asdict(config) | model_config).items()
        if name not in RESUMABLE_CHANGES and before.get(name) != value
    }
    # With eval_only nothing is trained, so these need no permission.
    allowed = ALLOWED_CHANGES if config.allow_changes or config.eval_only else set()
    refused = [text for name, text in changes.items() if name not in allowed]
    if refused:
        can_be_allowed = changes.keys() <= ALLOWED_CHANGES
        refuse_other_run(config.out_dir, "; ".join(refused), can_be_allowed)
    if changes and not config.eval_only:
        print(f"{config.out_dir} continues with changes: {'; '.join(changes.values())}", flush=True)


def identify_data(loader, config, start):
    """Return the token counts and the hash of train.bin, which must be equal on all ranks.

    Raises UserError if the resumed run had another tokenizer, other token counts or other hashes.
    """
    sha256 = loader.meta.get("train", {}).get("sha256")
    data = {"tokens": [loader.n_train, loader.n_val], "sha256": sha256}
    if start.checkpoint is not None:
        before = describe_data(start.record["meta"], start.record["data"]["tokens"])
        now = describe_data(loader.meta, data["tokens"])
        for name in before | now:
            if before.get(name) != now.get(name):
                difference = f"{name} was {before.get(name)}, is {now.get(name)}"
                refuse_other_run(config.out_dir, f"{loader.folder}/meta.json: {difference}")
    return data


def describe_data(meta, tokens):
    """Return what a dataset is known by, {name: value}, from its meta.json and token counts."""
    description = {
        "tokenizer": meta["tokenizer"],
        "vocab_size": meta["vocab_size"],
        "number of tokens [train.bin, val.bin]": tokens,
        "SHA-256 of train.bin": meta.get("train", {}).get("sha256"),
        "SHA-256 of val.bin": meta.get("val", {}).get("sha256"),
    }
    for token_id, char in enumerate(meta.get("chars") or []):
        description[f"token {token_id}"] = repr(char)
    return description


def prepare_out_dir(config, step, group):
    """Collective. Make out_dir ready for a run that begins or resumes after `step` steps.

    With overwrite, the run that is there is deleted now, when all options, data and weights are
    known to be right. The log loses the lines from `step` on, which the run writes again.
    """
    with group.exit_together():
        if not Path(config.out_dir).is_dir():  # rank 0 has made it, to lock it
            raise UserError(f"{config.out_dir} must be a directory that all machines share")
    with group.exit_together():
        if group.rank == 0 and config.overwrite:
            run_dir.remove_run(config.out_dir)
        elif group.rank == 0:
            run_dir.prune_checkpoints(config.out_dir, config.keep_checkpoints)
            run_dir.truncate_log(config.out_dir, step)


def refuse_other_run(out_dir, difference, can_be_allowed=False):
    remedy = "choose another --out_dir, or start over with --overwrite=True"
    if can_be_allowed:
        remedy += ", or continue it with --allow_changes=True"
    raise UserError(f"{out_dir} holds another run ({difference}): {remedy}")
