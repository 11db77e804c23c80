"""Write an exercise: a copy of our code in which the lines of one idea are left to you.

    python -m tools.exercise            list the exercises, easiest first
    python -m tools.exercise gqa        write model_my_gqa.py
    pytest -x -k my_gqa                 test it: the first failure says what is missing
    diff model_my_gqa.py model_gqa.py   compare it with ours

An exercise about a model is a complete model file, so train.py takes it (--model=model_my_gqa). One
about training is a small file with a single function. Both lie in the repository's root, and git
ignores them.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.exercise")

import ast
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, run_program
from configurator import configure

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Exercise:
    source: str  # the file with our solution
    task: str  # for the list
    blanks: dict  # {function, CLASS.METHOD, or FUNCTION.VARIABLE of a loop: lines of hints}

    @property
    def is_model(self):
        """Whether the exercise is a complete model file, not a single function."""
        return self.source.startswith("model")


EXERCISES = {
    "cache": Exercise(
        "model.py",
        "store keys and values, and return all so far",
        {
            "KVCache.extend": [
                "First raise ValueError if there would be more than self.max_len tokens; the",
                "message has both numbers.",
                "Write k and v into self.k[layer] and self.v[layer] from position self.pos on.",
                "self.k[layer] is (batch_size, H, max_len, D); return (B, H, S, D) of k and of v.",
                "Do not change self.pos: the other layers need it, and GPT.forward advances it.",
            ],
        },
    ),
    "rope": Exercise(
        "model_rope.py",
        "rotate pairs of channels by angles that follow from the positions",
        {
            "rotate": [
                "Channels i and i + D/2 are a pair: a and b are (B, H, T, D/2) each.",
                "Return (a cos - b sin, a sin + b cos), joined to (B, H, T, D), in x's dtype.",
            ],
            "GPT.rope_angles": [
                "D is the number of channels of a head: n_embd / n_head. Compute in float32.",
                "frequencies (D/2,): rope_theta^(-2i / D); angles (T, D/2): position * frequency",
            ],
        },
    ),
    "gqa": Exercise(
        "model_gqa.py",
        "split c_attn's output, and let groups of query heads share a KV head",
        {
            "CausalSelfAttention.forward": [
                "x is (B, T, C). c_attn returns C channels of q, then self.kv_channels each of",
                "k and v. With heads: q (B, H, T, D), k and v (B, G, T, D). If there is a cache,",
                "cache.extend(self.layer, k, v) returns all keys and values, (B, G, S, D) each.",
                "attend returns (B, H, T, D). Apply c_proj to (B, T, C), then dropout.",
                "The tests begin with attend, below.",
            ],
            "CausalSelfAttention.attend": [
                "q is (B, H, T, D), k and v are (B, G, S, D); return (B, H, T, D).",
                "Query heads 0 to H/G - 1 share KV head 0, the next H/G share KV head 1, ...",
                "There are three cases: T == 1, T == S, and a chunk with S > T > 1.",
                "F.scaled_dot_product_attention(q, k, v, dropout_p=, is_causal=, attn_mask=) takes",
                "one mask; dropout_p is self.dropout in training, and 0 otherwise. To copy the KV",
                "heads is right in all cases, but slow in decode.",
            ],
        },
    ),
    "window": Exercise(
        "model_swa.py",
        "the mask of a sliding window",
        {
            "CausalSelfAttention.attend_dense": [
                "q is (B, H, T, D), k and v are (B, H, S, D); return (B, H, T, D). The queries",
                "have the last T of the S positions. attn_mask is a bool tensor (T, S): True where",
                "a query attends to a key. dropout_p is self.dropout in training, and 0 otherwise.",
            ],
        },
    ),
    "ring": Exercise(
        "model_swa.py",
        "a KV cache that keeps the last `window` tokens",
        {
            "KVCache.extend": [
                "First raise ValueError if there would be more than self.max_len tokens; the",
                "message has both numbers.",
                "self.k[layer] and self.v[layer] are (batch_size, H, slots, D). Position p is in",
                "slot p % slots, and pos is the position of the first new token.",
                "One token: store it; return the slots in use, in any order.",
                "A chunk: return keys and values of the slots - 1 positions before it, as far as",
                "there are any, then its own, in the order of positions; store the last `slots`.",
            ],
        },
    ),
    "blocks": Exercise(
        "model_swa.py",
        "attention in blocks, linear in the length of the sequence",
        {
            "attend_blocks": [
                "Follow the comment above: size, n_before, n_blocks, then what is left over.",
                "attend_dense takes blocks as heads: q_blocks (BH, n_blocks, size, D), and of",
                "with_earlier_blocks k_blocks and v_blocks (BH, n_blocks, (n_before + 1) size, D).",
                "Attend to the T_rest queries before the blocks separately; join both along T.",
            ],
        },
    ),
    "accumulate": Exercise(
        "train.py",
        "the micro-steps of one optimizer step",
        {
            "train_step.micro_step": [
                "Before every micro-step but the first: if group.any_rank(run.stop.received), then",
                "run.zero_grad() and return None.",
                "x, y = run.loader.train_batch(first, count) are this rank's sequences of the",
                "micro-step, where sequence 0 is the first of step 0. Bring both to run.device.",
                "run.wrapped(x, y) is their mean loss. Compute it in run.autocast(), then call",
                "run.scaler.scale(...).backward(), all within",
                "parallel.gradient_sync(run.wrapped, enabled=...). Add the detached loss to loss.",
            ],
        },
    ),
    "ddp": Exercise(
        "training/parallel.py",
        "average the gradients of the ranks once per optimizer step, under DDP and FSDP",
        {
            "gradient_sync": [
                "A context manager: yield once. Forward and backward pass run inside it.",
                "wrapped is an FSDPModule, which has set_requires_gradient_sync(bool); or",
                "DistributedDataParallel, which averages in every backward pass except within its",
                "context manager no_sync(); or, in one process, a plain model: then only yield.",
            ],
        },
    ),
    "fsdp": Exercise(
        "training/parallel.py",
        "shard a model's parameters over the ranks",
        {
            "shard_model": [
                "group.world_size is the number of ranks; names are two strings of your choice.",
                "init_device_mesh(device.type, (replicas, shard_degree), mesh_dim_names=names)",
                "makes the mesh of several replicas; if there is one, use its second dimension",
                "alone, mesh[names[1]]. Call fully_shard(module, mesh=, mp_policy=) for each block",
                "of model.transformer.h, and last for the model. MixedPrecisionPolicy: parameters",
                "in dtype, gradients reduced in float32 (reduce_dtype), forward inputs not cast,",
                "so that RoPE's angles stay float32.",
            ],
        },
    ),
}


@dataclass
class ExerciseConfig:
    name: str | None = None  # the exercise to write; None: list all


def file_name(name):
    """Return the name of the file of an exercise."""
    return f"model_my_{name}.py" if EXERCISES[name].is_model else f"my_{name}.py"


def find(tree, path):
    """Return the node of a function, CLASS.METHOD, or FUNCTION.VARIABLE (the loop over it)."""
    node = tree
    for name in path.split("."):
        children = [child for child in ast.walk(node) if name_of(child) == name]
        assert len(children) == 1, f"{path}: {len(children)} definitions of {name}"
        node = children[0]
    return node


def name_of(node):
    """Return the name of a function or class, or of the variable of a loop; else None."""
    if isinstance(node, ast.For):
        return getattr(node.target, "id", None)
    return getattr(node, "name", None) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None


def blank(lines, node, hints):
    """Replace the body of a function or loop by hints, in a list of lines; keep its docstring."""
    first = node.body[0]
    indent = " " * first.col_offset
    has_docstring = not isinstance(node, ast.For) and ast.get_docstring(node) is not None
    start = first.end_lineno if has_docstring else first.lineno - 1
    while lines[start - 1].lstrip().startswith("#"):  # comments before the first statement
        start -= 1
    left_out = [f"{indent}# {hint}" for hint in hints]
    lines[start : node.end_lineno] = [*left_out, f"{indent}raise NotImplementedError"]


def exercise_text(exercise):
    """Return the text of the file of an exercise: its source, with its blanks."""
    text = (ROOT / exercise.source).read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    for path in reversed(exercise.blanks):  # from the end, so that the line numbers stay right
        blank(lines, find(tree, path), exercise.blanks[path])
    if not exercise.is_model:
        lines = small_file(exercise, tree, lines)
    return "\n".join(lines) + "\n"


def small_file(exercise, ours, lines):
    """Return the lines of a file with one function of `lines`, and the imports that ours needs.

    ours   the syntax tree of the source, with our solution
    """
    function = next(iter(exercise.blanks)).split(".")[0]
    used = {node.id for node in ast.walk(find(ours, function)) if isinstance(node, ast.Name)}
    module = exercise.source.removesuffix(".py").replace("/", ".")
    header = [f'"""Exercise: {exercise.task}.', "", f"Ours is {function} in {exercise.source}."]
    header += ['"""', ""]
    defined = []
    for node in ours.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [name for name in node.names if (name.asname or name.name) in used]
            header += [ast.unparse(node)] if node.names else []
        elif isinstance(node, ast.FunctionDef) and node.name in used:
            defined.append(node.name)
    if defined:
        header.append(f"from {module} import {', '.join(defined)}")
    node = find(ast.parse("\n".join(lines)), function)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return [*header, "", "", *lines[first - 1 : node.end_lineno]]


def main(argv):
    config = configure(ExerciseConfig, argv, __doc__, positional="name")
    if config.name is None:
        for name, exercise in EXERCISES.items():
            print(f"{name:<12}{exercise.task} ({', '.join(exercise.blanks)})")
        return
    if config.name not in EXERCISES:
        raise UserError(f"no exercise {config.name}; the exercises are {', '.join(EXERCISES)}")
    exercise, file = EXERCISES[config.name], file_name(config.name)
    try:
        with open(file, "x", encoding="utf-8") as target:
            target.write(exercise_text(exercise))
    except FileExistsError as error:
        raise UserError(f"{file} exists: rename or delete it to begin again") from error
    print(f"{file}: write {' and '.join(exercise.blanks)}")
    print(f"test it:     pytest -x -k my_{config.name}   (a minute, once the idea is right)")
    if exercise.is_model:
        print(f"compare it:  diff {file} {exercise.source}")
    else:
        print(f"compare it:  with {' and '.join(exercise.blanks)} in {exercise.source}")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
