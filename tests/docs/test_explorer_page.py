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


class Explorer:
    """The page in a window of the browser, with its errors and the URLs that it requested."""

    def __init__(self, page):
        self.page = page
        self.errors, self.requests = [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self.record)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(PAGE.as_uri())

    def record(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def set(self, **values):
        """Give controls values, as a user does: settings of number fields end with a change."""
        self.page.evaluate("document.getElementById('settings').open = true")
        for name, value in values.items():
            control = self.page.locator(f"#{name}")
            if control.evaluate("control => control.tagName") == "SELECT":
                control.select_option(str(value))
            else:
                control.fill(str(value))
                control.dispatch_event("change")
        return self

    def text(self, name):
        return self.page.locator(f"#{name}").inner_text()

    def count(self, name, shape):
        return self.page.locator(f"#{name} {shape}").count()

    def drawing(self, name):
        return self.page.locator(f"#{name}").inner_html()

    def texts(self, name):
        return self.page.locator(f"#{name} text").all_text_contents()

    def break_it(self, mistake):
        self.page.locator(f"[data-mistake={mistake}]").first.check()

    def choose_mode(self, mode):
        self.page.locator(f"input[name=mode][value={mode}]").check()


@pytest.fixture
def open_page(browser):
    opened = []

    def open_one(width=1200, theme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        opened.append(page)
        return Explorer(page)

    yield open_one
    for page in opened:
        page.close()


@pytest.fixture
def explorer(open_page):
    return open_page()


# The whole page -------------------------------------------------------------------------------


def test_the_footer_says_that_all_cases_pass(explorer):
    passed, total = re.match(r"(\d+) of (\d+) results", explorer.text("cases")).groups()
    assert passed == total
    assert int(total) >= 200


def test_no_control_causes_an_error_or_a_request(explorer):
    page = explorer.page
    explorer.set()
    for select in page.locator("select").all():
        for value in select.locator("option").all_text_contents():
            select.select_option(label=value)
    for box in page.locator("input[type=checkbox], input[type=radio]").all():
        box.check()
    for field in page.locator("input[type=number]").all():
        for value in (field.get_attribute("min"), field.get_attribute("max"), "", "3"):
            field.fill(value)
            field.dispatch_event("change")
    for button in page.locator("button").all():
        button.click()
    assert explorer.errors == []
    assert explorer.requests == [PAGE.as_uri()]


@pytest.mark.parametrize("width", [400, 800, 1200])
def test_the_page_does_not_scroll_sideways(open_page, width):
    explorer = open_page(width).set(size="gpt2-xl", T=8192, window=8192)
    explorer.set(cacheSize="gpt2-xl", stepSize="gpt2-xl", ranks=8)
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


def test_a_theme_follows_the_system_and_the_button_overrides_it(open_page):
    def background(explorer):
        return explorer.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(theme="light"), open_page(theme="dark")
    light_color, dark_color = background(light), background(dark)
    assert light_color != dark_color
    light.page.locator("#theme").click()
    dark.page.locator("#theme").click()
    assert (background(light), background(dark)) == (dark_color, light_color)


@pytest.mark.parametrize("width", [400, 1200])
def test_every_control_has_a_name_and_32_pixels(open_page, width):
    explorer = open_page(width).set()
    for control in explorer.page.locator("button, select, input, summary, nav a").all():
        name = control.evaluate(
            "control => control.ariaLabel || control.closest('label')?.textContent.trim()"
            " || control.textContent.trim()"
        )
        assert name
        target = control.evaluate(
            "control => (/checkbox|radio/.test(control.type) ? control.closest('label') : control)"
            ".getBoundingClientRect().height"
        )
        assert target >= 32, name


def test_a_value_out_of_range_is_clamped_with_a_note(explorer):
    explorer.set(T=99999)
    assert explorer.page.locator("#T").input_value() == "8192"
    assert "Tokens T" in explorer.text("note")
    assert "8,192" in explorer.text("note")
    explorer.set(T="")
    assert explorer.page.locator("#T").input_value() == "12"


def test_kv_heads_that_do_not_divide_the_query_heads_become_fewer_with_a_note(explorer):
    explorer.set(heads=12, kvHeads=5)
    assert explorer.page.locator("#kvHeads").input_value() == "4"
    assert "KV heads" in explorer.text("note")


def test_a_size_of_gpt2_sets_layers_heads_and_head_dim(explorer):
    explorer.set(size="gpt2-large")
    values = [explorer.page.locator(f"#{name}").input_value() for name in ("layers", "heads")]
    assert values == ["36", "20"]
    explorer.set(layers=4)
    assert explorer.page.locator("#size").input_value() == "custom"


def test_the_settings_are_closed_on_a_phone_and_open_on_a_wide_screen(open_page):
    assert not open_page(400).page.evaluate("document.getElementById('settings').open")
    assert open_page(1200).page.evaluate("document.getElementById('settings').open")


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
    svg.hover(position={"x": 30 + 36 * 1.5, "y": 18 + 36 * 5.5})
    assert "key 1: distance 4 is not less than window 4" in explorer.text("mask-says")


def test_arrow_keys_choose_a_query_and_a_key(explorer):
    explorer.page.locator("#mask-chunk").focus()
    explorer.page.keyboard.press("ArrowUp")
    explorer.page.keyboard.press("ArrowLeft")
    explorer.page.keyboard.press("ArrowLeft")
    assert "Query 10 attends to key 9: distance 1 < window 4" in explorer.text("mask-says")


@pytest.mark.parametrize(  # from the table of docs/REPORT.md
    "T, window, needed, blocks",
    [(1024, 256, 229_504, 458_752), (1024, 5, 5_110, 126_976), (8192, 256, 2_064_512, 4_128_768)],
)
def test_the_counted_scores_are_those_of_the_report(explorer, T, window, needed, blocks):
    explorer.set(T=T, window=window)
    bars = explorer.text("scores")
    for number in (needed, blocks, T * T, T * (T + 1) // 2):
        assert f"{number:,}" in bars
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


def test_a_click_on_a_column_chooses_the_output(explorer):
    explorer.page.locator("#field-drawing").click(position={"x": 96 + 64 * 7.5, "y": 12})
    assert "Output 7 depends on" in explorer.text("field-says")


def test_a_full_layer_reaches_every_token(explorer):
    explorer.set(fullEvery=2)
    assert "Layer 2 of 3 attends to all earlier positions" in explorer.text("field-says")
    assert explorer.count("field-drawing", "circle.key") == 4 + 12 + 12


# (c) The KV cache -----------------------------------------------------------------------------


def slots_of(explorer, name):
    """Return the positions in the slots of a drawing, "" for an empty one."""
    return explorer.page.locator(f"#{name} text:is(.strong, .on-key):not(.old)").all_text_contents()


def test_position_9_is_in_slot_1_of_4_and_replaces_position_5(explorer):
    sentence = explorer.text("cache-says")
    assert "Position 9 is in slot 9 % 4 = 1, where it replaces position 5" in sentence
    assert "attends to 7 to 10" in sentence
    assert slots_of(explorer, "ring") == ["8", "9", "6", "7"]
    assert slots_of(explorer, "plain")[:10] == [str(position) for position in range(10)]


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
    product = f"2 × 12 layers × 12 KV heads × 64 × 1,023 tokens × {itemsize} bytes"
    assert f"{product} = {total:,} bytes" in explorer.text("bytes-says")
    table = explorer.text("bytes")
    assert f"{total // 12:,}" in table  # MQA
    assert f"2 × 12 layers × 12 KV heads × 64 × 256 tokens (of 1,023) × {itemsize} bytes" in table


def test_a_loss_within_the_interval_of_another_has_a_warning(explorer):
    warned = explorer.page.locator("#bytes tr:has(.unsure) th").all_text_contents()
    assert warned == ["RoPE + SWA", "all three"]  # as the comparisons of docs/REPORT.md


def test_a_size_whose_heads_cannot_be_halved_says_so(explorer):
    explorer.set(cacheSize="gpt2-xl")
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
    assert "only the distance counts" in explorer.text("curve-says")


@pytest.mark.parametrize("position", [200, 300, 302, 1003, 8000])
def test_neighbors_that_bfloat16_makes_equal_are_named(explorer, position):
    explorer.set(position=position)
    near = torch.arange(position - 4, position + 5)
    same = near[near.bfloat16() == torch.tensor(position).bfloat16()].tolist()
    sentence = explorer.text("rounding-says")
    assert len(same) == 1 or all(str(other) in sentence for other in same)
    assert ("get the same angles" in sentence) == (len(same) > 1)
    assert ("are enough for these" in sentence) == bool((near.bfloat16().long() == near).all())


# (e) A training step --------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 8])
def test_every_rank_has_a_row(explorer, ranks):
    explorer.set(ranks=ranks)
    rows = [text for text in explorer.texts("ranks-drawing") if text.startswith("rank")]
    assert rows == [f"rank {rank}" for rank in range(ranks)]
    explorer.choose_mode("one")
    assert [text for text in explorer.texts("ranks-drawing") if "rank" in text] == ["rank 0"]


def test_fsdp_gathers_a_block_and_frees_it(explorer):
    explorer.set(event=2)
    assert "all-gather: Every rank receives all shards of block 0" in explorer.text("event-says")
    assert explorer.count("ranks-drawing", ".gathered") == 2 * 4  # root and block 0, on four ranks
    explorer.set(event=4)
    assert "free" in explorer.text("event-says")
    assert explorer.count("ranks-drawing", ".gathered") == 4


def test_ddp_ends_with_averaged_gradients_on_every_rank(explorer):
    explorer.choose_mode("ddp")
    explorer.set(event=8)
    while "step:" not in explorer.text("event-says"):
        explorer.page.locator("[data-slider=event][data-by='1']").click()
    assert explorer.count("ranks-drawing", ".gradients:not(.faint)") == 4 * 4  # four groups
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


# Screenshots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_screenshots_of_all_panels(open_page, tmp_path, width, theme):
    folder = Path(os.environ.get("EXPLORER_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page = open_page(width, theme).page
    page.screenshot(path=folder / f"top_{width}_{theme}.png")
    page.add_style_tag(content=".bar { position: static !important; }")  # it would cover a panel
    for panel in PANELS:
        path = folder / f"{panel}_{width}_{theme}.png"
        page.locator(f"#{panel}").screenshot(path=path)
        assert path.stat().st_size > 10_000
