"""A variant differs from model.py where its idea is, and nowhere else: the texts are compared."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIANTS = ["model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa"]
# The functions, methods and classes (without their methods) whose text differs from model.py.
CONFIG = {"GPTConfig", "GPTConfig.__post_init__"}
CACHE = {"KVCache", "KVCache.__init__", "KVCache.extend"}
ROPE = {"CausalSelfAttention.forward", "Block.forward", "GPT", "GPT.__init__", "GPT.forward"}
GQA = {"CausalSelfAttention", "CausalSelfAttention.__init__", "CausalSelfAttention.forward"}
SWA = {"CausalSelfAttention.__init__"}
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
        "CausalSelfAttention.attend_dense",
        "attend_blocks",
        "with_earlier_blocks",
    },
}
ADDED["model_rope_gqa_swa"] = ADDED["model_rope"] | ADDED["model_swa"]


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def first_line(node):
    """Return the index of the first line of a definition, that of its first decorator if any."""
    numbers = [decorator.lineno for decorator in node.decorator_list]
    return min([node.lineno, *numbers]) - 1


def pieces(name):
    """Return the texts of all functions, methods and classes as {name: text}, in order.

    The text of a class ends before its first method.
    """
    text = source(name)
    lines = text.splitlines()
    found = {}

    def add(node, piece, end):
        found[piece] = "\n".join(lines[first_line(node) : end]).rstrip()

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            add(node, node.name, node.end_lineno)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            add(node, node.name, first_line(methods[0]) if methods else node.end_lineno)
            for method in methods:
                add(method, f"{node.name}.{method.name}", method.end_lineno)
    return found


def imports(name):
    """Return the import statements of a file, without comments."""
    nodes = ast.walk(ast.parse(source(name)))
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


# Against model.py -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_same_classes_and_functions_in_the_same_order(name):
    common = [piece for piece in pieces(name) if piece not in ADDED[name]]
    assert common == list(pieces("model"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_these_classes_and_functions_alone(name):
    base, ours = pieces("model"), pieces(name)
    assert {piece for piece in base if ours[piece] != base[piece]} == CHANGED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_imports_of_model_py(name):
    assert imports(name) == imports("model")


# model_rope_gqa_swa against the others --------------------------------------------------------


@pytest.mark.parametrize(
    "piece", ["rotate", "GPT.rope_angles", "Block.forward", "GPT", "GPT.__init__", "GPT.forward"]
)
def test_model_rope_gqa_swa_rotates_as_model_rope_does(piece):
    assert pieces("model_rope_gqa_swa")[piece] == pieces("model_rope")[piece]


@pytest.mark.parametrize(
    "piece", ["CausalSelfAttention.attend_dense", "attend_blocks", "with_earlier_blocks"]
)
def test_model_rope_gqa_swa_attends_to_windows_as_model_swa_does(piece):
    assert pieces("model_rope_gqa_swa")[piece] == pieces("model_swa")[piece]


def test_model_rope_gqa_swa_has_the_ring_buffer_of_model_swa_with_kv_heads():
    swa = pieces("model_swa")["KVCache.extend"]
    with_kv_heads = swa.replace("(B, H, ", "(B, G, ")  # the shapes in comments
    assert pieces("model_rope_gqa_swa")["KVCache.extend"] == with_kv_heads
