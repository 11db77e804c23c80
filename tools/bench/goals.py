"""The project's goals for speed: ratios with a floor and an aim, read from the rows of results."""

from dataclasses import dataclass, field

from tools.bench.results import median

ANY = "any"


@dataclass
class Goal:
    """One goal: the best value of a column among the rows that have these values."""

    name: str
    benchmark: str
    column: str
    floor: float
    aim: float
    rows: dict = field(default_factory=dict)  # {column: value} of the rows that count
    device: str = "cpu"  # cpu, cuda or any
    amx: bool | None = None  # True: only CPUs with AMX; False: only those without
    low_is_good: bool = False

    def applies(self, results):
        """Return whether the goal is one for this result file."""
        machine = results["machine"]
        kind = "cpu" if machine["device"] in ("cpu", "mps") else "cuda"
        has_amx = "amx_bf16" in machine.get("instructions", [])
        is_device = self.device in (ANY, kind)
        is_cpu = self.amx is None or self.amx == has_amx
        return self.benchmark == results["benchmark"] and is_device and is_cpu

    def value(self, results):
        """Return the value of the goal, or None if no row has it."""
        values = []
        for row in results["rows"]:
            if self.rows.items() <= row.items() and row.get(self.column) is not None:
                values.append(median(row[self.column]))
        if not values:
            return None
        return min(values) if self.low_is_good else max(values)

    def is_met(self, value, limit):
        return value <= limit if self.low_is_good else value >= limit


def sampling_goal(streams, dtype, floor, aim):
    plural = "s" if streams > 1 else ""
    name = f"decoding 124M, {streams} stream{plural}, {dtype}, against transformers"
    rows = {"streams": streams, "dtype": dtype, "contestant": "ours"}
    return Goal(name, "sample", "transformers_over_this", floor, aim, rows)


def read_limit_goal(dtype, floor):
    name = f"decoding 124M, 1 stream, {dtype}, fraction of the memory-read limit"
    rows = {"streams": 1, "dtype": dtype, "contestant": "ours"}
    return Goal(name, "sample", "of_read_limit", floor, 0.85, rows)


def window_goal(dtype):
    name = f"SWA forward + backward, T=8192, {dtype}, against full causal attention"
    return Goal(name, "attention", "full_over_sliding", 6, 10, {"dtype": dtype, "T": 8192})


def overhead_goal(config):
    name = f"loader, log, evaluation, checkpoints of {config}: fraction of the step"
    rows = {"config": config}
    return Goal(name, "overhead", "fraction", 0.02, 0.01, rows, device=ANY, low_is_good=True)


BFLOAT16 = {"contestant": "ours", "dtype": "bfloat16"}
NANOGPT = "nanogpt_over_this"
GOALS = [
    Goal("124M step: products / step", "train", "products_over_step", 0.78, 0.88, BFLOAT16),
    Goal("124M step against nanoGPT", "train", NANOGPT, 2.3, 2.6, BFLOAT16, amx=False),
    Goal("124M step against nanoGPT, AMX", "train", NANOGPT, 4, 5, BFLOAT16, amx=True),
    Goal("124M, compiled: MFU", "train", "mfu", 0.41, 0.55, BFLOAT16, "cuda"),
    Goal("124M, compiled, against nanoGPT", "train", NANOGPT, 1.1, 1.3, BFLOAT16, "cuda"),
    Goal("time to validation loss 1.885 against nanoGPT", "loss", NANOGPT, 2.2, 4),
    sampling_goal(1, "float32", 1.4, 2),
    sampling_goal(1, "bfloat16", 1.4, 2),
    read_limit_goal("float32", 0.55),
    read_limit_goal("bfloat16", 0.45),
    sampling_goal(10, "float32", 1.5, 2.5),
    sampling_goal(10, "bfloat16", 1.5, 2.5),
    window_goal("float32"),
    window_goal("bfloat16"),
    Goal(
        "tokenizing against tiktoken on all cores",
        "data",
        "tiktoken_over_this",
        0.8,
        0.95,
        {"contestant": "ours, tokenize"},
        device=ANY,
    ),
    overhead_goal("quickstart"),
    overhead_goal("GPT-2 124M"),
]


def goal_values(results):
    """Return {name: value} of the goals that a result file says something about."""
    values = {}
    for goal in GOALS:
        if goal.applies(results):
            values[goal.name] = goal.value(results)
    return values


def describe_goal(goal, value):
    """Return (value, floor, aim, verdict) of a goal as text."""
    sign = "<=" if goal.low_is_good else ">="
    if value is None:
        verdict = "not measured"
    elif not goal.is_met(value, goal.floor):
        verdict = "misses its floor"
    elif not goal.is_met(value, goal.aim):
        verdict = "reaches its floor"
    else:
        verdict = "reaches its aim"
    shown = "" if value is None else f"{value:.3g}"
    return shown, f"{sign} {goal.floor:g}", f"{sign} {goal.aim:g}", verdict


def shortfalls(all_results):
    """Return a line for each goal that a result does not reach, or says nothing about.

    all_results   the results of one device
    """
    lines = []
    for results in all_results:
        for goal in GOALS:
            if not goal.applies(results):
                continue
            value, floor, _, verdict = describe_goal(goal, goal.value(results))
            if verdict in ("misses its floor", "not measured"):
                lines.append(f"{goal.name}: {verdict}, {value or 'no value'} (floor {floor})")
    return lines
