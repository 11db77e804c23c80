"""docs/explorer.html computes what the model files compute.

The JSON block of the page is compared with what the model files return now, and the functions of
the page, which node runs, with the block.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from documents import ROOT

import model_swa
from experiments import drawing_data, explorer, look, probes

TEXT = (ROOT / "docs" / "explorer.html").read_text(encoding="utf-8")
PAGE = explorer.read_block(TEXT)
each_function = pytest.mark.parametrize("name", explorer.FUNCTIONS)
each_mistake = pytest.mark.parametrize("mistake", probes.MISTAKES)


def cases_of(name):
    return [case for case in PAGE["cases"] if case[0] == name]


def mistakes_of(arguments):
    """Return the mistakes of a case, {name: True}."""
    last = arguments[-1]
    return last if isinstance(last, dict) and last.keys() <= probes.MISTAKES.keys() else {}


def as_json(value):
    return json.loads(json.dumps(value))


def approximately(value):
    """Return a result of float32 that may differ from another machine's in its last digits."""
    return pytest.approx(value, rel=1e-6, abs=1e-5)


# The JSON block is that of the model files ----------------------------------------------------


@each_function
def test_the_cases_of_the_page_are_what_the_model_files_compute(name):
    computed = [explorer.make_case(name, case) for case in explorer.ARGUMENTS[name]]
    for actual, (_, arguments, result) in zip(as_json(computed), cases_of(name), strict=True):
        assert actual[:2] == [name, arguments]
        expected = approximately(result) if name in explorer.IN_FLOAT32 else result
        assert actual[2] == expected, arguments


def test_the_constants_of_the_page_are_those_of_the_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert as_json(explorer.make_constants()) == PAGE["constants"]


def test_the_constants_are_not_copied(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model_swa, "MIN_BLOCK", 32)
    assert explorer.make_constants()["MIN_BLOCK"] == 32


def test_main_replaces_the_block_and_nothing_else(tmp_path, monkeypatch, capsys):
    page = tmp_path / "explorer.html"
    page.write_text(explorer.fill(TEXT, "{}\n"), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(explorer, "PAGE", page)
    monkeypatch.setattr(explorer, "ARGUMENTS", {"headOf": [(3, 12, 4)]})
    explorer.main([])
    written = page.read_text(encoding="utf-8")
    assert explorer.read_block(written)["cases"] == [["headOf", [3, 12, 4], 1]]
    assert explorer.fill(written, "") == explorer.fill(TEXT, "")
    assert capsys.readouterr().out == f"{page}\n"


def test_the_block_is_small_and_has_a_line_for_each_case():
    [block] = explorer.BLOCK.finditer(TEXT)
    assert len(block[0]) < 60_000
    lines = [line for line in block[0].splitlines() if line.startswith('["')]
    assert len(lines) == len(PAGE["cases"]) >= 200


@each_function
def test_each_function_has_cases(name):
    assert len(cases_of(name)) >= 8


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("maskOf", [5, 0, 9], id="window longer than the sequence"),
        pytest.param("keysHeld", [4, 3, 20], id="window longer than cache and chunk"),
        pytest.param("countScores", [12, None], id="no window"),
        pytest.param("computedBlocks", [1, 4], id="one token"),
        pytest.param("receptiveField", [1, 4, 3, 0, 0], id="field of one token"),
        pytest.param("headOf", [5, 6, 1], id="MQA"),
        pytest.param("ringAfter", [1, [3, 1, 2]], id="one slot"),
        pytest.param("ringAfter", [4, [9, 1]], id="chunk longer than the ring"),
        pytest.param("angle", [5, 0, 2, 10000], id="one pair"),
    ],
)
def test_limits_are_among_the_cases(name, arguments):
    assert arguments in [case[1] for case in cases_of(name)]


# Mistakes -------------------------------------------------------------------------------------


@each_mistake
def test_a_mistake_changes_the_result_of_a_case(mistake):
    changed = []
    for name, arguments, result in PAGE["cases"]:
        if mistakes_of(arguments) == {mistake: True}:
            _, _, right = explorer.make_case(name, arguments[:-1])
            changed.append(as_json(right) != result)
    assert any(changed)


@pytest.mark.parametrize("name", ["model_rope", "training.parallel"])
def test_the_model_files_are_right_after_a_mistake(name):
    module = importlib.import_module(name)
    mistake = {"model_rope": "restart", "training.parallel": "noSync"}[name]
    with probes.make_mistakes({mistake: True}):
        assert importlib.import_module(name) is not module
    assert importlib.import_module(name) is sys.modules[name] is module


def test_a_mistake_whose_text_has_gone_is_an_error():
    with pytest.raises(ValueError, match="no such text"):
        probes.edited_module("model", [("no such text", "")])


# The probes agree with independent ways to compute --------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 9])
def test_a_probed_mask_is_the_rule(window):
    assert torch.equal(probes.attention_mask(9, 0, window), drawing_data.window_mask(9, window))
    # A later chunk has the last rows of the mask of the whole sequence.
    later = probes.attention_mask(4, 5, window)
    assert torch.equal(later, drawing_data.window_mask(9, window)[5:])


def test_probed_slots_are_those_of_the_drawing():
    states = probes.ring_after(4, [3] + [1] * 8)
    assert [state["slots"] for state in states] == drawing_data.ring_steps(4, [3] + [1] * 8)[0]


@pytest.mark.parametrize("tokens, window", [(1024, 16), (1024, 256), (1024, 400), (333, 70)])
def test_probed_blocks_are_those_of_the_drawing(tokens, window):
    blocks = probes.computed_blocks(tokens, window)
    for block, (queries, keys) in zip(
        blocks, drawing_data.computed_blocks(tokens, window), strict=True
    ):
        assert (block["firstQuery"], block["queries"]) == (queries[0], len(queries))
        assert (block["firstKey"], block["keys"]) == (keys[0], len(keys))


def test_the_last_probed_field_is_the_receptive_field_of_the_model():
    torch.manual_seed(0)
    config = model_swa.GPTConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=5, window=3)
    field = look.receptive_field(model_swa.GPT(config), 10)
    assert probes.receptive_field(10, 3, 3, 0, 8)[-1] == field[8].tolist()


def test_a_probed_score_is_a_product_of_rotated_vectors():
    q, k = explorer.vector(8, 1), explorer.vector(8, 2)
    query = drawing_data.rotate_vector(torch.tensor(q), torch.tensor([9]))[0]
    key = drawing_data.rotate_vector(torch.tensor(k), torch.tensor([2]))[0]
    expected = (query @ key).item() / 8**0.5
    assert probes.score(q, k, 9, 2, 10000) == pytest.approx(expected, abs=1e-5)


# The functions of the page, run by node -------------------------------------------------------

[FUNCTIONS] = re.findall(r'<script id="functions">\n(.*?)</script>', TEXT, re.DOTALL)
RUN = "JSON.stringify(runCases(data))"


def node(expression, functions=FUNCTIONS):
    """Return the value of an expression, a text in JSON, behind the functions of the page."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    script = f"const data = {json.dumps(PAGE)};\n{functions}\nconsole.log({expression});"
    completed = subprocess.run(["node", "-"], input=script, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def test_the_page_computes_all_cases():
    result = node(RUN)
    assert result["failures"] == []
    assert result["passed"] == result["total"] == len(PAGE["cases"])


@each_mistake
def test_a_switch_without_effect_fails_its_cases(mistake):
    switch = f"mistakes.{mistake}"
    assert switch in FUNCTIONS
    failures = node(RUN, FUNCTIONS.replace(switch, "false"))["failures"]
    assert any(mistake in mistakes_of(failure["arguments"]) for failure in failures)


# {function: (text, replacement)}: each makes the function wrong.
WRONG = {
    "angle": ("(-2 * pair) / headDim", "(-2 * pair) / (headDim - 2)"),
    "attends": ("0 <= i - j && i - j < window", "0 <= i - j && i - j <= window"),
    "bfloat16": ("+ 0x7fff + lowestKept", "+ 0x8000"),
    "cacheBytes": ("Math.min(tokens, window)", "tokens"),
    "computedBlocks": ("blocksBefore + 1) * size", "blocksBefore + 2) * size"),
    "countScores": ("Math.min(query + 1, window)", "window"),
    "headOf": ("Math.floor(queryHead / (heads / kvHeads))", "queryHead % kvHeads"),
    "keysHeld": ("cached - window + 1", "cached - window"),
    "maskOf": ("isAligned && attends(query, key,", "isAligned && attends(row, key,"),
    "parameters": ("linear(C, 4 * C), ...linear(4 * C, C)", "linear(C, 4 * C)"),
    "receptiveField": ("layer % fullEvery === 0", "(layer - 1) % fullEvery === 0"),
    "ringAfter": (": position % slots;", ": (position + 1) % slots;"),
    "rotate": (": pair + headDim / 2;", ": headDim - 1 - pair;"),
    "score": ("Math.sqrt(q.length)", "q.length"),
    "stepBytes": ("held.optimizerState = 8 * shard;", "held.optimizerState = 4 * shard;"),
    "stepEvents": ("gatherNext(blocks[layers - 1]);", ""),
}


@each_function
def test_a_wrong_function_fails_its_cases(name):
    text, replacement = WRONG[name]
    assert FUNCTIONS.count(text) == 1
    result = node(RUN, FUNCTIONS.replace(text, replacement))
    assert name in {failure["function"] for failure in result["failures"]}
    assert result["passed"] < result["total"]


def test_the_events_of_a_step_hold_and_send_what_is_estimated():
    setups = []
    for name, arguments, _ in PAGE["cases"]:
        if name in ("stepBytes", "stepEvents") and not mistakes_of(arguments):
            setups.append(arguments[0])
    both = "(setup) => [stepBytes(setup), stepEvents(setup)]"
    for estimated, events in node(f"JSON.stringify({json.dumps(setups)}.map({both}))"):
        for quantity in events[0]["held"]:
            held = [event["held"][quantity] for event in events]
            assert max(held) == estimated[quantity]
            assert min(held) >= 0
        assert sum(event["sent"] for event in events) == estimated["sentPerStep"]
        end = events[-1]["held"]
        assert end["parametersInDtype"] == end["unshardedGradients"] == 0
