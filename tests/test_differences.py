"""What the model files have in common, down to the text: a variant differs from model.py where its idea is, no more."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VARIANTS = ["model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa"]
# The functions, methods and classes (those without their methods) whose text is not model.py's.
CONFIG = {"GPTConfig", "GPTConfig.__post_init__"}
CACHE = {"KVCache", "KVCache.__init__", "KVCache.extend"}
ROPE = {"CausalSelfAttention.forward", "Block.forward", "GPT", "GPT.__init__", "GPT.forward"}
GQA = {"CausalSelfAttention", "CausalSelfAttention.__init__", "CausalSelfAttention.forward"}
SWA = {"CausalSelfAttention.__init__", "GPT.flops_per_token"}
ATTEND = {"CausalSelfAttention.attend"}
CHANGED = {
    "model_rope": CONFIG | ROPE,
    "model_gqa": CONFIG | CACHE | GQA | ATTEND,
    "model_swa": CONFIG | CACHE | SWA | ATTEND,
    "model_rope_gqa_swa": CONFIG | CACHE | ROPE | GQA | SWA | ATTEND | {"GPT.make_cache"},
}
ADDED = {
    "model_rope": {"rotate", "GPT.rope_angles"},
    "model_gqa": set(),
    "model_swa": {
        "with_earlier_blocks",
        *(f"CausalSelfAttention.attend_{how}" for how in ("dense", "blocks")),
    },
}
ADDED["model_rope_gqa_swa"] = ADDED["model_rope"] | ADDED["model_swa"]


def source(name):
    return (ROOT / f"{name}.py").read_text()


def pieces(name):
    """The text of every function, method and class (a class without its methods), by name, in order."""
    text, found = source(name), {}
    lines = text.splitlines()

    def add(nodes, prefix=""):
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            is_class = isinstance(node, ast.ClassDef)
            last = (
                methods[0].lineno - 1 - len(methods[0].decorator_list)
                if is_class and methods
                else node.end_lineno
            )
            found[prefix + node.name] = "\n".join(lines[first:last]).rstrip()
            if is_class:
                add(methods, f"{node.name}.")

    add(ast.parse(text).body)
    return found


def code(name):
    """The lines of code of a file, without indentation, comments and docstrings."""
    text = source(name)
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line for line in (re.sub(r"(^|  )#.*", "", line.strip()) for line in lines) if line]


# Against model.py -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_same_classes_and_functions_in_the_same_order(name):
    assert [piece for piece in pieces(name) if piece not in ADDED[name]] == list(pieces("model"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_the_text_of_these_classes_and_functions_alone(name):
    base, ours = pieces("model"), pieces(name)
    assert {piece for piece in base if ours[piece] != base[piece]} == CHANGED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_imports_what_model_py_does(name):
    imports = [
        [line for line in code(file) if line.startswith(("import ", "from "))]
        for file in ("model", name)
    ]
    assert imports[0] == imports[1]


# model_rope_gqa_swa against the others --------------------------------------------------------


@pytest.mark.parametrize(
    "piece", ["rotate", "GPT.rope_angles", "Block.forward", "GPT", "GPT.__init__", "GPT.forward"]
)
def test_the_three_together_rotate_as_model_rope_does(piece):
    assert pieces("model_rope_gqa_swa")[piece] == pieces("model_rope")[piece]


def test_the_three_together_have_the_ring_of_model_swa_with_fewer_heads():
    swa = pieces("model_swa")["KVCache.extend"]
    fewer_heads = swa.replace("(B, H, ", "(B, G, ")  # in shapes
    assert pieces("model_rope_gqa_swa")["KVCache.extend"] == fewer_heads
