"""docs/explorer.html in a browser: each panel follows the settings, and each mistake shows.

The tests need playwright and a chromium on PATH, or its path in $CHROMIUM:

    pytest -m browser
    EXPLORER_SCREENSHOTS=out/explorer pytest -m browser    # keeps the screenshots in a folder

What the page's functions compute is tested by tests/tools/test_explorer.py.
"""

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from documents import ROOT

from experiments import probes

PAGE = ROOT / "docs" / "explorer.html"
PANELS = ("mask", "field", "cache", "rotary", "training")
NAMES = ("chromium", "chromium-browser", "google-chrome")

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("no chromium: install one, or set CHROMIUM", allow_module_level=True)
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


SET = """values => {
  for (const [id, value] of Object.entries(values)) {
    const control = document.getElementById(id);
    control.value = value;
    for (const type of ["input", "change"]) {
      control.dispatchEvent(new Event(type, { bubbles: true }));
    }
  }
}"""


class Explorer:
    """The page in a window of the browser, with its errors and the URLs that it requested."""

    def __init__(self, page):
        self.page = page
        self.errors, self.requests = [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self.record)
        page.on("request", lambda request: self.requests.append(request.url))

    def record(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self):
        """Open the page anew: all controls have their first values."""
        self.page.goto("about:blank")
        self.errors.clear()
        self.requests.clear()
        self.page.goto(PAGE.as_uri())
        return self

    def set(self, **values):
        """Give controls values, one after another, each with the events of a user's change."""
        self.page.evaluate(SET, values)
        return self

    def value(self, name):
        return self.page.locator(f"#{name}").input_value()

    def text(self, name):
        return self.page.locator(f"#{name}").inner_text()

    def note(self, name):
        """Return the sentence below the fields among which a field is."""
        group = "ancestor::*[self::details or contains(@class, 'controls')]"
        note = f"xpath=//*[@id='{name}']/{group}/following-sibling::*[1][@class='note']"
        return self.page.locator(note).inner_text()

    def count(self, name, shape):
        return self.page.locator(f"#{name} {shape}").count()

    def drawing(self, name):
        return self.page.locator(f"#{name}").inner_html()

    def texts(self, name):
        return self.page.locator(f"#{name} text").all_text_contents()

    def break_it(self, mistake):
        self.page.locator(f"[data-mistake={mistake}]").first.check()


@pytest.fixture(scope="module")
def open_page(browser):
    """Return a function that opens the page, in one window for each width and theme."""
    windows = {}

    def open_one(width=1200, theme="light"):
        if (width, theme) not in windows:
            size = {"width": width, "height": 900}
            windows[width, theme] = Explorer(browser.new_page(viewport=size, color_scheme=theme))
        return windows[width, theme].open()

    return open_one


@pytest.fixture
def explorer(open_page):
    return open_page()


# The whole page -------------------------------------------------------------------------------


def test_the_footer_says_that_all_cases_pass(explorer):
    pattern = r"with (\d+) results of the model files: (\d+) are equal"
    total, passed = re.search(pattern, explorer.text("cases")).groups()
    assert passed == total
    assert int(total) >= 200


def test_no_control_causes_an_error_or_a_request(explorer):
    page = explorer.page
    for select in page.locator("select").all():
        for value in select.locator("option").all_text_contents():
            select.select_option(label=value)
    for box in page.locator("input[type=checkbox]").all():
        box.check()
    for field in page.locator("input[type=number]").all():
        for value in (field.get_attribute("min"), field.get_attribute("max"), "", "3"):
            explorer.set(**{field.get_attribute("id"): value})
    for button in page.locator("button").all():
        button.click()
    assert explorer.errors == []
    assert explorer.requests == [PAGE.as_uri()]


@pytest.mark.parametrize("width", [400, 800, 1200])
def test_the_page_does_not_scroll_sideways(open_page, width):
    explorer = open_page(width).set(size="gpt2-xl", T=8192, window=8192)
    explorer.set(ranks=8)
    for mistake in probes.MISTAKES:
        explorer.break_it(mistake)
    assert explorer.page.evaluate("document.documentElement.scrollWidth") == width


LARGE = {"T": 1024, "window": 256, "layers": 12, "kvHeads": 12, "position": 8000, "ranks": 8}
FIND_BAD_TEXTS = """svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent);
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  const cut = ([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  const overlap = ([, a], [, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  const covered = (box, at) => boxes.slice(at + 1).some(other => overlap(box, other));
  return boxes.filter((box, at) => cut(box) || covered(box, at)).map(([content]) => content);
}"""


@pytest.mark.parametrize(
    "settings", [{}, {"T": 32, "heads": 32}, LARGE], ids=["first", "32", "large"]
)
@pytest.mark.parametrize("width", [400, 1200])
def test_no_text_of_a_drawing_is_cut_off_or_covered_by_another(open_page, width, settings):
    explorer = open_page(width).set(**settings)
    drawings = explorer.page.locator("svg").all()
    bad = {svg.get_attribute("id"): svg.evaluate(FIND_BAD_TEXTS) for svg in drawings}
    assert {name: texts for name, texts in bad.items() if texts} == {}


def test_the_theme_is_that_of_the_system(open_page):
    def background(theme):
        page = open_page(theme=theme).page
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert background("light") == "rgb(255, 255, 255)"
    assert background("dark") != background("light")


@pytest.mark.parametrize("width", [400, 1200])
def test_every_control_has_a_name_and_32_pixels(open_page, width):
    explorer = open_page(width)
    explorer.page.evaluate("document.getElementById('settings').open = true")
    for control in explorer.page.locator("button, select, input, summary, nav a").all():
        name = control.evaluate(
            "control => control.ariaLabel || control.closest('label')?.textContent.trim()"
            " || control.textContent.trim()"
        )
        assert name
        target = control.evaluate(
            "control => (control.type === 'checkbox' ? control.closest('label') : control)"
            ".getBoundingClientRect().height"
        )
        assert target >= 32, name


def test_a_value_out_of_range_is_clamped_with_a_note(explorer):
    explorer.set(T=99999)
    assert explorer.value("T") == "8192"
    assert "Tokens T" in explorer.note("T")
    assert "8,192" in explorer.note("T")
    explorer.set(T="")
    assert explorer.value("T") == "12"


@pytest.mark.parametrize("key", ["Tab", "Enter"])
@pytest.mark.parametrize(
    "name, typed, corrected, reason",
    [
        ("kvHeads", "5", "4", "divide 12 query heads"),
        ("headDim", "63", "64", "an even number"),
        ("layers", "3.5", "4", "a whole number"),
        ("window", "", "4", "an empty field"),
        ("tokens", "0", "1", "between 1 and"),
    ],
)
def test_a_correction_is_said_near_the_field_until_the_next_change(
    explorer, key, name, typed, corrected, reason
):
    field = explorer.page.locator(f"#{name}")
    field.click()
    field.press("Control+A")
    field.press("Delete")
    field.press_sequentially(typed)
    field.press(key)
    assert field.input_value() == corrected
    note = explorer.note(name)
    assert reason in note
    assert f"became {corrected}" in note
    explorer.page.keyboard.press("Tab")
    explorer.page.mouse.move(500, 500)
    assert explorer.note(name) == note
    explorer.set(chunk=3)
    assert explorer.note(name) == ""


def test_a_size_of_gpt2_sets_layers_heads_and_head_dim(explorer):
    explorer.set(size="gpt2-large")
    assert [explorer.value(name) for name in ("layers", "heads")] == ["36", "20"]
    explorer.set(layers=5)
    assert explorer.value("size") == "custom"


def test_kv_heads_that_do_not_divide_a_size_become_its_heads_with_a_note(explorer):
    explorer.set(size="gpt2-xl")
    assert explorer.value("kvHeads") == "25"
    note = explorer.note("kvHeads")
    assert "KV heads: 4 became 25, because it must divide 25 query heads" in note


def test_the_settings_are_closed_on_a_phone_and_open_on_a_wide_screen(open_page):
    assert not open_page(400).page.evaluate("document.getElementById('settings').open")
    assert open_page(1200).page.evaluate("document.getElementById('settings').open")


def test_the_settings_fold_when_the_page_is_scrolled_and_open_again(explorer):
    page = explorer.page
    page.locator("#rotary").scroll_into_view_if_needed()
    page.wait_for_function("!document.getElementById('settings').open")
    page.locator("#summary").click()
    page.mouse.wheel(0, 300)
    page.locator("#training").scroll_into_view_if_needed()
    assert page.locator("#window").is_visible()


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize(
    "mistake, drawing",
    [
        ("lessOrEqual", "mask-training"),
        ("topLeft", "mask-chunk"),
        ("lessOrEqual", "field-drawing"),
        ("oneSlotOff", "ring"),
        ("repeat", "heads-drawing"),
        ("bfloat16Angles", "dials"),
        ("bfloat16Angles", "curve"),
        ("restart", "curve"),
        ("interleaved", "conventions"),
        ("noSync", "timeline"),
        ("rootOnly", "timeline"),
    ],
)
def test_a_switch_and_its_drawing_fit_the_window_together(open_page, width, mistake, drawing):
    page = open_page(width).page
    panel = page.locator(f"section:has(#{drawing})")
    svg = page.locator(f"#{drawing}").bounding_box()
    heights = []
    for box in panel.locator(f"[data-mistake={mistake}]").all():
        y = box.bounding_box()["y"]
        heights.append(max(svg["y"] + svg["height"], y) - min(svg["y"], y))
    assert min(heights) < 600


def test_the_keyboard_alone_reaches_the_cache_and_steps_it(explorer):
    def tab_to(condition):
        for _ in range(60):
            explorer.page.keyboard.press("Tab")
            if explorer.page.evaluate(f"document.activeElement.{condition}"):
                return
        raise AssertionError(f"no Tab stop with {condition}")

    tab_to("id === 'cacheStep'")
    before = explorer.text("cache-says")
    explorer.page.keyboard.press("ArrowRight")
    after_arrow = explorer.text("cache-says")
    tab_to("textContent === 'Next ›'")
    explorer.page.keyboard.press("Enter")
    assert "Position 9 " in before
    assert "Position 10 " in after_arrow
    assert "Position 11 " in explorer.text("cache-says")


# (a) The mask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("T, window", [(12, 4), (12, 1), (9, 9), (32, 5)])
def test_the_mask_has_a_blue_cell_for_each_key_of_a_window(explorer, T, window):
    explorer.set(T=T, window=window, chunk=3)
    attended = [min(query + 1, window) for query in range(T)]
    assert explorer.count("mask-training", ".key") == sum(attended)
    assert explorer.count("mask-chunk", ".key") == sum(attended[-3:])
    assert explorer.count("mask-decode", ".key") == attended[-1]
    dropped = max(0, T - 1 - (window - 1))  # before decode
    assert explorer.count("mask-decode", ".gone") == dropped


def test_a_cell_under_the_pointer_is_explained(explorer):
    svg = explorer.page.locator("#mask-training")
    svg.hover(position={"x": 42 + 36 * 1.5, "y": 18 + 36 * 5.5})
    assert "key 1: distance 4 is not less than window 4" in explorer.text("mask-says")


def test_arrow_keys_choose_a_query_and_a_key(explorer):
    explorer.page.locator("#mask-chunk").focus()
    explorer.page.keyboard.press("ArrowUp")
    explorer.page.keyboard.press("ArrowLeft")
    explorer.page.keyboard.press("ArrowLeft")
    assert "Query 10 attends to key 9: distance 1 < window 4" in explorer.text("mask-says")
    explorer.page.keyboard.press("Home")
    assert "Query 10 does not attend to key 0" in explorer.text("mask-says")
    explorer.page.keyboard.press("End")
    assert "Query 10 does not attend to key 11" in explorer.text("mask-says")


@pytest.mark.parametrize(  # from the table of docs/REPORT.md
    "T, window, needed, blocks",
    [(1024, 256, 229_504, 458_752), (1024, 5, 5_110, 126_976), (8192, 256, 2_064_512, 4_128_768)],
)
def test_the_counted_scores_are_those_of_the_report(explorer, T, window, needed, blocks):
    explorer.set(T=T, window=window)
    assert f"need {needed:,} scores" in explorer.text("scores-says")
    counted = {"dense": T * T, "causal": T * (T + 1) // 2, "blocks": blocks}
    for name, number in counted.items():
        assert f": {number:,} (" in explorer.text(f"{name}-caption")
    assert f"all {T * T:,} scores are computed" in explorer.text("scores-says")


def test_a_window_of_the_whole_sequence_needs_one_block_of_all_tokens(explorer):
    explorer.set(T=1024, window=1024)
    assert explorer.count("scores-blocks", "polygon.waste") == 1
    assert "leaves nothing out" in explorer.text("scores-says")


def test_an_example_draws_the_rectangles_of_blocks(explorer):
    assert explorer.count("scores-blocks", "polygon.waste") == 1
    explorer.page.get_by_role("button", name="T 1,024, window 256").click()
    assert explorer.count("scores-blocks", "polygon.waste") == 4
    assert explorer.page.locator("#T").input_value() == "1024"


# (b) The receptive field ----------------------------------------------------------------------


def test_three_layers_with_window_4_reach_9_tokens_back(explorer):
    assert "3 × (4 − 1) = 9 tokens back" in explorer.text("field-says")
    assert "tokens 2 to 11" in explorer.text("field-says")
    assert explorer.count("field-drawing", "circle.key") == 4 + 7 + 10


def test_another_output_has_another_receptive_field(explorer):
    explorer.set(output=5)
    assert "tokens 0 to 5" in explorer.text("field-says")
    assert explorer.count("field-drawing", "circle.key") == 4 + 6 + 6


def test_a_full_layer_reaches_every_token(explorer):
    explorer.set(fullEvery=2)
    assert "Layer 2 of 3 attends to all earlier positions" in explorer.text("field-says")
    assert explorer.count("field-drawing", "circle.key") == 4 + 12 + 12


# (c) The KV cache -----------------------------------------------------------------------------


def slots_of(explorer, name):
    """Return the positions in the slots of a drawing, "" for an empty one."""
    positions = explorer.page.locator(f"#{name} text:is(.strong, .on-key, .on-query)")
    return positions.all_text_contents()


def test_position_9_is_in_slot_1_of_4_and_replaces_position_5(explorer):
    sentence = explorer.text("cache-says")
    assert "Position 9 is in slot 9 % 4 = 1, where it replaces position 5" in sentence
    assert "attends to 7 to 10" in sentence
    assert slots_of(explorer, "ring") == ["8", "9", "6", "7"]
    assert slots_of(explorer, "plain")[:10] == [str(position) for position in range(10)]
    assert explorer.page.locator("#ring text.old").all_text_contents() == ["5"]
    assert explorer.count("ring", ".query") == explorer.count("ring", "text.on-query") == 1


def test_a_long_ring_has_the_slots_of_the_window_and_says_that_it_is_cut(explorer):
    explorer.set(T=1024, window=256, cacheStep=7)
    assert "9 % 256 = 9" in explorer.text("cache-says")
    assert "Ring buffer of 256 slots" in explorer.text("ring-caption")
    assert "the first 32 are drawn" in explorer.text("ring-caption")
    assert explorer.count("ring", "rect") == 32


def test_back_and_next_step_through_the_tokens(explorer):
    following = explorer.page.locator("[data-slider=cacheStep][data-by='1']")
    explorer.page.locator("[data-slider=cacheStep][data-by='-1']").click()
    assert "Position 8 is in slot 8 % 4 = 0" in explorer.text("cache-says")
    following.click()
    following.click()
    assert slots_of(explorer, "ring") == ["8", "9", "10", "7"]


def test_a_chunk_that_wraps_continues_at_slot_0(explorer):
    explorer.set(plan="wrap", cacheStep=1)
    assert "position 4 is in slot 4 % 4 = 0" in explorer.text("cache-says")
    assert slots_of(explorer, "ring") == ["4", "5", "2", "3"]
    assert slots_of(explorer, "returned") == ["0", "1", "2", "3", "4", "5"]


def test_of_a_chunk_longer_than_the_ring_the_last_positions_stay(explorer):
    explorer.set(plan="long", cacheStep=1)
    assert "only 5 to 8 stay" in explorer.text("cache-says")
    assert slots_of(explorer, "ring") == ["8", "5", "6", "7"]


def test_a_line_leads_from_each_query_head_to_its_kv_head(explorer):
    explorer.set(heads=6, kvHeads=2)
    assert explorer.count("heads-drawing", "polyline") == 6
    assert "3 neighboring query heads share a KV head" in explorer.text("heads-says")
    explorer.set(kvHeads=1)
    assert "MQA" in explorer.text("heads-says")


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
def test_the_bytes_of_a_cache_have_their_product_written_out(explorer, dtype, itemsize):
    explorer.set(dtype=dtype)
    total = 2 * 12 * 12 * 64 * 1023 * itemsize
    product = f"2 × 12 layers × 12 KV heads × 64 channels × 1,023 tokens × {itemsize} bytes"
    assert f"{product} = {total:,} bytes" in explorer.text("bytes-says")
    table = explorer.text("bytes")
    assert f"{total // 12:,}" in table  # MQA
    assert "2 × 12 layers × 12 KV heads × 64 channels × 256 tokens (of 1,023)" in table


def test_a_loss_within_the_interval_of_another_has_a_warning(explorer):
    warned = explorer.page.locator("#bytes tr:has(.unsure) th").all_inner_texts()
    # As the comparisons of docs/REPORT.md.
    assert [name.split("\n")[0] for name in warned] == ["RoPE + SWA", "all three"]


def test_a_size_whose_heads_cannot_be_halved_says_so(explorer):
    explorer.set(tableSize="gpt2-xl")
    assert "25 query heads are not a multiple of 2" in explorer.text("bytes")


# (d) Rotary pairs -----------------------------------------------------------------------------


def hands_of(explorer):
    """Return the angles of the dials' hands, 0 <= angle < 2 pi."""
    angles = []
    for points in explorer.page.locator("#dials polyline").all():
        numbers = [float(number) for number in re.split("[ ,]", points.get_attribute("points"))]
        angles.append(math.atan2(numbers[1] - numbers[3], numbers[2] - numbers[0]) % (2 * math.pi))
    return angles


@pytest.mark.parametrize("position, theta", [(5, 10000), (3, 100)])
def test_the_hands_have_the_angles_of_rope(explorer, position, theta):
    explorer.set(position=position, theta=theta)
    pairs = [int(text.split()[1]) for text in explorer.texts("dials") if text.startswith("pair")]
    expected = [position * theta ** (-2 * pair / 64) % (2 * math.pi) for pair in pairs]
    assert pairs[0] == 0 and pairs[-1] == 31
    assert hands_of(explorer) == pytest.approx(expected, abs=1e-6)


def distance_of_dots_from_line(explorer):
    line = explorer.page.locator("#curve polyline.ink").get_attribute("points").split()
    dots = explorer.page.locator("#curve circle").all()
    heights = [float(point.split(",")[1]) for point in line]
    assert len(dots) == len(heights) == 65
    offsets = [float(dot.get_attribute("cy")) - y for dot, y in zip(dots, heights, strict=True)]
    return max(map(abs, offsets))


@pytest.mark.parametrize("shift", [50, 1000, 8000])
def test_a_shift_of_both_positions_leaves_the_scores(explorer, shift):
    explorer.set(shift=shift)
    assert distance_of_dots_from_line(explorer) < 1e-6
    assert "stay on the line" in explorer.text("curve-says")


@pytest.mark.parametrize("position", [200, 300, 302, 1003, 8000])
def test_neighbors_that_bfloat16_makes_equal_are_named(explorer, position):
    explorer.break_it("bfloat16Angles")
    explorer.set(position=position)
    near = torch.arange(position - 4, position + 5)
    same = near[near.bfloat16() == torch.tensor(position).bfloat16()].tolist()
    sentence = explorer.text("dials-says")
    assert all(f"{other:,}" in sentence for other in same)
    assert ("get the same angles" in sentence) == (len(same) > 1)
    assert ("is a bfloat16 number" in sentence) == (len(same) == 1)


# (e) A training step --------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 8])
def test_every_rank_has_a_row(explorer, ranks):
    explorer.set(ranks=ranks)
    rows = [text for text in explorer.texts("ranks-drawing") if text.startswith("rank")]
    assert rows == [f"rank {rank}" for rank in range(ranks)]
    explorer.set(mode="one")
    assert [text for text in explorer.texts("ranks-drawing") if "rank" in text] == ["rank 0"]


def test_fsdp_gathers_a_block_and_frees_it(explorer):
    explorer.set(event=2)
    assert "all-gather: Every rank receives all shards of block 0" in explorer.text("event-says")
    assert explorer.count("ranks-drawing", ".gathered") == 2 * 4  # root and block 0, on four ranks
    explorer.set(event=4)
    assert "free" in explorer.text("event-says")
    assert explorer.count("ranks-drawing", ".gathered") == 4


def test_ddp_ends_with_averaged_gradients_on_every_rank(explorer):
    explorer.set(mode="ddp", event=99)  # the last event
    assert "step:" in explorer.text("event-says")
    assert explorer.count("ranks-drawing", ".gradients") == 4 * 4  # four groups
    assert explorer.count("ranks-drawing", ".gathered") == 0


def test_micro_steps_add_events(explorer):
    before = explorer.text("event-label")
    explorer.set(microSteps=2)
    assert explorer.text("event-label") != before
    assert "unsharded gradients" in explorer.text("totals")


def test_the_totals_are_16_bytes_per_parameter(explorer):
    assert f"16 × 124,439,808 = {16 * 124_439_808:,} bytes" in explorer.text("totals-says")
    assert "497.8" in explorer.text("totals")  # MB of parameters in one process
    assert "124.4" in explorer.text("totals")  # of four shards


def test_the_totals_are_for_the_model_that_they_name(explorer):
    assert "gpt2, 4 ranks" in explorer.text("totals")
    explorer.set(size="gpt2-medium")
    assert "gpt2-medium, 4 ranks" in explorer.text("totals")
    assert "gpt2-medium: 2 × 24 layers" in explorer.text("bytes-says")


def row_of(explorer, name):
    row = explorer.page.locator(f"#totals tr:has(th:text-is('{name}'))")
    return row.locator("td").all_text_contents()


def test_without_an_all_reduce_ddp_sends_nothing(explorer):
    assert row_of(explorer, "sent per step") == ["0", "746.6", "687.6"]
    explorer.break_it("noSync")
    assert row_of(explorer, "sent per step") == ["0", "0", "687.6"]


def test_one_group_for_the_whole_model_is_in_the_totals(explorer):
    explorer.break_it("rootOnly")
    name = "parameters in bfloat16, at most"
    held = explorer.page.locator(f"#totals tr:has-text('{name}') td").last.text_content()
    assert float(held) == pytest.approx(2 * 124.44, abs=0.1)  # two bytes for each parameter


# Mistakes -------------------------------------------------------------------------------------

# (mistake, drawing, sentence, a part of the sentence with the mistake)
MISTAKES = [
    ("lessOrEqual", "mask-training", "mask-says", "query 4 attends to key 0"),
    ("lessOrEqual", "field-drawing", "field-says", "4 instead of 3 tokens back"),
    ("topLeft", "mask-chunk", "mask-says", "query 11 does not attend to key 11"),
    ("oneSlotOff", "ring", "cache-says", "slot 0 instead of 3 % 4 = 3"),
    (
        "repeat",
        "heads-drawing",
        "heads-says",
        "KV head 1 % 4 = 1 in training",
    ),
    ("interleaved", "conventions", "conventions-says", "(0, 1) and (2, 3)"),
    ("bfloat16Angles", "curve", "curve-says", "they depend on where"),
    ("restart", "curve", "curve-says", "they depend on where"),
    ("noSync", "ranks-drawing", "event-says", "the copies now differ"),
    ("rootOnly", "ranks-drawing", "event-says", "the whole model"),
]


@pytest.mark.parametrize("mistake, drawing, sentence, part", MISTAKES)
def test_a_mistake_changes_its_drawing_and_its_sentence(explorer, mistake, drawing, sentence, part):
    before = explorer.drawing(drawing)
    assert part not in explorer.text(sentence)
    explorer.break_it(mistake)
    assert explorer.drawing(drawing) != before
    assert part in explorer.text(sentence)
    follows = explorer.page.locator(f"[data-follows={mistake}]")
    assert all(text.is_visible() for text in follows.all())
    explorer.page.locator(f"[data-mistake={mistake}]").first.uncheck()
    assert part not in explorer.text(sentence)
    assert not any(text.is_visible() for text in follows.all())
    assert explorer.drawing(drawing) == before


@pytest.mark.parametrize(
    "mistake, before",
    [
        ("bfloat16Angles", {"position": "77"}),
        ("oneSlotOff", {"cacheStep": "6"}),
        ("rootOnly", {"mode": "ddp", "event": "7"}),
        ("noSync", {"mode": "fsdp", "event": "20"}),
    ],
)
def test_after_a_mistake_the_controls_are_back_where_they_were(explorer, mistake, before):
    explorer.set(**before)
    explorer.break_it(mistake)
    assert [explorer.value(name) for name in before] != list(before.values())
    explorer.page.locator(f"[data-mistake={mistake}]").first.uncheck()
    assert [explorer.value(name) for name in before] == list(before.values())


def test_with_bfloat16_the_position_and_the_angles_are_rounded(explorer):
    explorer.break_it("bfloat16Angles")
    assert "rounds positions 1,003, 1,004 and 1,005 to 1,004" in explorer.text("dials-says")
    explorer.set(position=5)
    sentence = explorer.text("dials-says")
    assert "Position 5 is a bfloat16 number" in sentence
    exact, rounded = map(float, re.search(r"from ([\d.]+) to ([\d.]+)\.$", sentence).groups())
    assert exact == pytest.approx(5 * 10000 ** (-12 / 64), abs=1e-4)
    assert rounded == pytest.approx(torch.tensor(exact).bfloat16().item(), abs=1e-4)


# Screenshots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_screenshots_of_all_panels(open_page, tmp_path, width, theme):
    folder = Path(os.environ.get("EXPLORER_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page = open_page(width, theme).page
    page.screenshot(path=folder / f"top_{width}_{theme}.png")
    # What follows the window would cover a panel.
    page.add_style_tag(content=".bar, .masks .says { position: static !important; }")
    for panel in PANELS:
        path = folder / f"{panel}_{width}_{theme}.png"
        page.locator(f"#{panel}").screenshot(path=path)
        assert path.stat().st_size > 10_000
