"""Options: config files and the command line fill a dataclass, and what is wrong is one line."""

import re
from dataclasses import dataclass, field, fields

import pytest

import sample
import train
from common.errors import UserError, program
from common.models import config_fields, model_names
from configurator import OTHER_NAMES, check_range, configure, configure_with_model
from tools import plot_loss


@dataclass
class Options:
    # Shape
    batch_size: int = 16  # sequences in one forward
    learning_rate: float = 6e-4  # the highest
    # Rest
    fsdp: bool = False  # shard the model
    model: str = "model"  # the model file
    stop: str | None = None  # text that ends a sample
    top_k: int | None = 200  # choose among so many
    top_p: float | None = None  # share of the probability
    compile: bool | str = "auto"  # torch.compile
    runs: list[str] = field(default_factory=list)  # folders of runs


@dataclass
class Shape:
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads


def options_of(*argv, **how):
    return configure(Options, list(argv), "A program.", **how)


def with_shape(*argv, hint=lambda name: ""):
    """The filled Options, and a dict of the options of Shape that are given."""
    return configure_with_model(Options, list(argv), "A program.", lambda options: Shape, hint)


def complaint(*argv, parse=options_of, **how):
    """The message of the UserError that these arguments raise: one line."""
    with pytest.raises(UserError) as error:
        parse(*argv, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# Where values come from -----------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    assert options_of() == Options()


def test_a_config_file_sets_options_and_may_calculate(config_file):
    options = options_of(
        config_file("batch_size = 2**3 * 5\nlearning_rate = batch_size / 100\nmodel = 'model_rope'")
    )
    assert options == Options(batch_size=40, learning_rate=0.4, model="model_rope")


def test_modules_functions_and_names_that_begin_with_underscore_are_not_options(config_file):
    text = "import math\nfrom math import isqrt\n_n = 25\ndef root(n):\n    return math.isqrt(n)\nbatch_size = root(_n)"
    assert options_of(config_file(text)) == Options(batch_size=5)


def test_the_later_of_config_files_and_options_wins(config_file):
    a, b = config_file("batch_size = 1\ntop_k = 5", "a.py"), config_file("batch_size = 2", "b.py")
    assert options_of(a, b) == Options(batch_size=2, top_k=5)
    assert options_of(a, "--batch_size=3").batch_size == 3
    assert options_of("--batch_size=3", a).batch_size == 1
    assert options_of("--batch_size=3", "--batch_size=5").batch_size == 5


# Typed values ---------------------------------------------------------------------------------

TYPED = {
    "learning_rate": {"1": 1.0, "1e-3": 0.001},
    "batch_size": {"1_000": 1000, "-1": -1},
    "fsdp": {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False},
    "top_k": {"None": None, "7": 7},
    "top_p": {"1": 1.0},
    "stop": {"None": None, "7": "7"},
    "compile": {"auto": "auto", "false": False},
    "model": {
        "None": "None",
        "model_mine": "model_mine",
        "a=b": "a=b",
        "--x=y": "--x=y",
        "wörter und": "wörter und",
    },
}
QUOTED = {
    "'model_mine'": "model_mine",
    '"model_mine"': "model_mine",
    "": "",
    "''": "",
    "'": "'",
    "don't": "don't",
}
TYPED["model"] |= QUOTED | {"'a' or 'b'": "'a' or 'b'"}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in TYPED for text in TYPED[name]])
def test_an_argument_is_read_as_its_option_says(name, text):
    got, value = getattr(options_of(f"--{name}={text}"), name), TYPED[name][text]
    assert (got, type(got)) == (value, type(value))


ASSIGNED = [
    ("learning_rate", 1, 1.0),
    ("fsdp", True, True),
    ("top_k", None, None),
    ("top_p", 1, 1.0),
]
ASSIGNED += [("stop", None, None), ("stop", '"quoted"', '"quoted"'), ("compile", False, False)]
ASSIGNED += [("compile", "auto", "auto"), ("model", "a=b", "a=b"), ("runs", ["a", "b"], ["a", "b"])]


@pytest.mark.parametrize(("name", "assigned", "value"), ASSIGNED)
def test_a_value_of_a_config_file_is_taken_as_its_option_says(config_file, name, assigned, value):
    got = getattr(options_of(config_file(f"{name} = {assigned!r}")), name)
    assert (got, type(got)) == (value, type(value))


WRONG_TYPED = [("batch_size", text, "int") for text in ("1.5", "", "None", "True", "eight")]
WRONG_TYPED += [("learning_rate", text, "float") for text in ("high", "None")]
WRONG_TYPED += [("fsdp", text, "bool") for text in ("yes", "2", "None")]
WRONG_TYPED += [("top_k", "1.5", "int or None"), ("top_p", "most", "float or None")]


@pytest.mark.parametrize(("name", "text", "expected"), WRONG_TYPED)
def test_a_wrong_type_on_the_command_line_is_refused_with_the_right_one(name, text, expected):
    assert complaint(f"--{name}={text}") == f"{name}={text}: expected {expected}"


WRONG_ASSIGNED = [("batch_size", value, "int") for value in (True, 1.0, "8", None, [8])]
WRONG_ASSIGNED += [("learning_rate", value, "float") for value in (True, "1e-3")]
WRONG_ASSIGNED += [("fsdp", value, "bool") for value in ("True", 0.0)]
WRONG_ASSIGNED += [("model", value, "str") for value in (3, None)]
WRONG_ASSIGNED += [
    ("top_k", 1.5, "int or None"),
    ("compile", 2, "bool or str"),
    ("runs", "a", "list"),
]


@pytest.mark.parametrize(("name", "assigned", "expected"), WRONG_ASSIGNED)
def test_a_wrong_type_in_a_config_file_is_refused_with_the_right_one(
    config_file, name, assigned, expected
):
    assert (
        complaint(config_file(f"{name} = {assigned!r}"))
        == f"{name}={assigned!r}: expected {expected}"
    )


# What is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "hint"),
    [("--batchsize=8", "batchsize: did you mean batch_size?"), ("--xyzzy=8", "xyzzy: --help")],
)
def test_an_unknown_option_names_the_nearest_or_points_to_help(argument, hint):
    assert f"unknown option {hint}" in complaint(argument)


def test_a_variable_of_a_config_file_that_is_no_option_is_refused(config_file):
    assert "unknown option learnin_rate: did you mean learning_rate?" in complaint(
        config_file("learnin_rate = 1e-3")
    )


def test_a_hint_says_which_model_has_an_unknown_option():
    hint = {"window": "it is an option of model_swa"}.get
    assert "it is an option of model_swa" in complaint("--window=5", parse=with_shape, hint=hint)
    assert "did you mean batch_size?" in complaint("--batch_sise=5", parse=with_shape, hint=hint)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_of_another_project_is_answered_with_ours(name):
    message = complaint(f"--{name}=1", parse=with_shape)
    assert message.startswith(f"unknown option {name}: ") and "did you mean" not in message


def test_the_options_that_answer_other_names_exist():
    programs = (train.TrainConfig, sample.SampleConfig, plot_loss.PlotConfig)
    known = {field.name for program in programs for field in fields(program)}
    known |= {name for model in model_names() for name in config_fields(model)}
    named = {option for answer in OTHER_NAMES.values() for option in re.findall(r"--(\w+)", answer)}
    assert named and named <= known
    assert not OTHER_NAMES.keys() & known  # else the answer would never be given


TYPED_BY_OTHERS = [
    "eval_iters",
    "save_interval",
    "n_kv_heads",
    "num_kv_heads",
    "sliding_window",
    "start",
    "lr",
]
TYPED_BY_OTHERS += [
    "max_iters",
    "gradient_accumulation_steps",
    "decay_lr",
    "lr_decay_iters",
    "warmup_iters",
]
TYPED_BY_OTHERS += ["always_save_checkpoint", "wandb_log", "shard_size", "timeout"]


@pytest.mark.parametrize("name", TYPED_BY_OTHERS)
def test_the_names_that_nanogpt_and_transformers_users_type_are_known(name):
    assert name in OTHER_NAMES


def test_a_missing_config_file_is_refused_and_the_folder_listed(config_file, tmp_path):
    config_file("", "there.py")
    message = complaint(str(tmp_path / "gone.py"))
    assert "gone.py" in message and "there.py" in message
    assert "gone.py" in complaint(str(tmp_path / "nowhere" / "gone.py"))


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("batch_size = 8\nmodel = = 3\n", 2, "SyntaxError"),
        ("zero = 0\n\nbatch_size = 8 // zero\n", 3, "ZeroDivisionError"),
        (
            "def f():\n    return int('x')\n\n\nbatch_size = f()\n",
            2,
            "ValueError",
        ),  # the line in the function
        (
            "import json\nbatch_size = json.loads('{')\n",
            2,
            "JSONDecodeError",
        ),  # not the library's line
        ("import math\nimport broken_module\n", 2, "SyntaxError"),  # not the module's line
        ("raise ValueError('first\\nsecond')", 1, "ValueError: first second"),
    ],
)
def test_an_exception_in_a_config_file_names_file_and_line(
    config_file, tmp_path, monkeypatch, text, line, error
):
    monkeypatch.syspath_prepend(tmp_path)
    config_file("\n\n\n\nx = = 1", "broken_module.py")
    path = config_file(text)
    assert f"{path}, line {line}: {error}" in complaint(path)


@pytest.mark.parametrize(
    "content", [b"batch_size = '\xff'", b"batch_size = 8\x00"], ids=["not UTF-8", "null byte"]
)
def test_a_config_file_that_is_not_text_is_refused(tmp_path, content):
    (tmp_path / "config.py").write_bytes(content)
    assert f"{tmp_path}/config.py" in complaint(f"{tmp_path}/config.py")


@pytest.mark.parametrize("argument", ["--fsdp", "-fsdp=True", "-f", "--", "-"])
def test_an_option_without_value_is_refused(argument):
    message = complaint(argument)
    assert message.startswith(argument) and "--key=value" in message


def test_a_stray_positional_is_refused():
    assert "quickstart" in complaint("quickstart")


# Positionals ----------------------------------------------------------------------------------


def test_a_positional_is_read_as_its_option_says_and_there_can_be_one_only():
    assert options_of("8", positional="batch_size").batch_size == 8
    assert "second" in complaint("first", "second", positional="model")


def test_a_list_positional_takes_all_and_replaces_that_of_a_config_file(config_file):
    path = config_file("runs = ['out/a']")
    assert options_of(path, "out/b", "--batch_size=2", "out/c", positional="runs").runs == [
        "out/b",
        "out/c",
    ]


@pytest.mark.parametrize("argv", [["out/a", "--runs=out/b"], ["--runs=out/b"]])
def test_a_list_is_not_read_from_an_option(argv):
    assert "expected list" in complaint(*argv, positional="runs")


# Bounds ---------------------------------------------------------------------------------------


def test_an_option_at_its_lowest_value_or_none_is_accepted():
    check_range(Options(batch_size=16, top_k=None), 16, "batch_size", "top_k")


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (-0.5, "at least 0"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (1e30, "below 2**63"),
        (2**63, "below 2**63"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_bound_that_it_breaks(value, bound):
    with pytest.raises(UserError) as error:
        check_range(Options(learning_rate=value), 0, "batch_size", "learning_rate")
    assert str(error.value) == f"learning_rate={value} must be {bound}"


# The options of a model -----------------------------------------------------------------------


def test_the_options_of_the_model_that_are_given_come_as_a_dict(config_file):
    filled, rest = with_shape(config_file("n_layer = 3"), "--batch_size=2", "--n_head=5")
    assert (filled, rest) == (Options(batch_size=2), {"n_layer": 3, "n_head": 5})


def test_the_filled_options_choose_the_model():
    seen = []
    choose = lambda options: seen.append(options) or Shape
    configure_with_model(Options, ["--model=model_swa"], "", choose, lambda name: "")
    assert seen == [Options(model="model_swa")]


@pytest.mark.parametrize(
    ("argument", "message"), [("--n_layer=x", "expected int"), ("--n_laier=3", "mean n_layer?")]
)
def test_what_is_wrong_with_an_option_of_the_model_is_refused_too(argument, message):
    assert message in complaint(argument, parse=with_shape)


# Help -----------------------------------------------------------------------------------------

HELP = """
A program.

Options, as --key=value or in a config file:

  Shape:
    --batch_size: int = 16                       sequences in one forward
    --learning_rate: float = 0.0006              the highest
  Rest:
    --fsdp: bool = False                         shard the model
    --model: str = model                         the model file
    --stop: str | None = None                    text that ends a sample
    --top_k: int | None = 200                    choose among so many
    --top_p: float | None = None                 share of the probability
    --compile: bool | str = auto                 torch.compile
    --runs: list
"""


@pytest.mark.parametrize(("flag", "parse"), [("--help", options_of), ("-h", with_shape)])
def test_help_shows_group_type_default_and_comment_of_each_option_and_exits_0(capsys, flag, parse):
    with pytest.raises(SystemExit) as end:
        parse(flag)
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(HELP.strip()) and "folders of runs" in text
    assert ("--n_layer: int = 12" in text and "query heads" in text) == (parse is with_shape)


# The program ----------------------------------------------------------------------------------


def failing(error):
    @program
    def main():
        raise error

    return main


def test_a_program_returns_what_its_main_returns():
    assert program(lambda argv: argv)(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("no data: make it"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_user_error_or_an_interrupt_is_one_line_on_stderr_and_a_status(capsys, error, status):
    with pytest.raises(SystemExit) as end:
        failing(error)()
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (status, "", 1)
    assert str(error) in err


def test_our_own_bug_keeps_its_traceback():
    with pytest.raises(AssertionError):
        failing(AssertionError("a bug"))()
