"""configurator.py: config files and the command line fill a dataclass; an error is one line.

Also common/errors.py: the exit status and the output of a program that fails.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from programs import OPTIONS

import sample
import train
from common.errors import OtherRankError, UserError, run_program
from common.models import config_fields, model_module, models_with_option
from configurator import OTHER_NAMES, check_minimum, configure, configure_with_model

ROOT = Path(__file__).parents[2]


@dataclass
class Options:
    # Shape
    batch_size: int = 16  # sequences in one forward
    learning_rate: float = 6e-4  # peak
    # Rest
    fsdp: bool = False  # shard the model
    model: str = "model"  # the model file
    stop: str | None = None  # text that ends a sample
    top_k: int | None = 200  # sample among the k likeliest
    top_p: float | None = None  # fraction of the probability
    compile: bool | str = "auto"  # torch.compile
    runs: list[str] = field(default_factory=list)  # folders of runs


@dataclass
class Shape:
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads


def options_of(*argv, **kwargs):
    """Return the Options that these arguments give."""
    return configure(Options, list(argv), "A program.", **kwargs)


def with_shape(*argv, hint=lambda name: "", **kwargs):
    """Return the filled Options, and a dict of the options of Shape that are given."""
    return configure_with_model(
        Options, list(argv), "A program.", lambda options: Shape, hint, **kwargs
    )


def user_error(*argv, parse=options_of, **kwargs):
    """Return the message of the UserError that these arguments raise; it is one line."""
    with pytest.raises(UserError) as error:
        parse(*argv, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config_file(tmp_path):
    """Return a function that writes a config file and returns its path."""

    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# Where values come from -----------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    assert options_of() == Options()


def test_a_config_file_sets_options_and_may_calculate(config_file):
    path = config_file(
        "batch_size = 2**3 * 5\nlearning_rate = batch_size / 100\nmodel = 'model_rope'"
    )
    assert options_of(path) == Options(batch_size=40, learning_rate=0.4, model="model_rope")


NO_OPTIONS = """
import math
from math import isqrt
_n = 25
def root(n):
    return math.isqrt(n)
batch_size = root(_n)
"""


def test_modules_functions_and_names_that_begin_with_underscore_are_not_options(config_file):
    assert options_of(config_file(NO_OPTIONS)) == Options(batch_size=5)


# Typed values ---------------------------------------------------------------------------------

# (option, text on the command line, value)
TYPED = [
    ("learning_rate", "1", 1.0),
    ("learning_rate", "1e-3", 0.001),
    ("batch_size", "1_000", 1000),
    ("batch_size", "-1", -1),
    ("fsdp", "true", True),
    ("fsdp", "True", True),
    ("fsdp", "1", True),
    ("fsdp", "false", False),
    ("fsdp", "False", False),
    ("fsdp", "0", False),
    ("top_k", "None", None),
    ("top_k", "7", 7),
    ("top_p", "1", 1.0),
    ("stop", "None", None),
    ("stop", "7", "7"),
    ("compile", "auto", "auto"),
    ("compile", "false", False),
    ("model", "None", "None"),
    ("model", "model_mine", "model_mine"),
    ("model", "a=b", "a=b"),
    ("model", "--x=y", "--x=y"),
    ("model", "wörter und", "wörter und"),
    # the shell has removed its own quotes
    ("model", "'To be'", "'To be'"),
    ("model", '"To be"', '"To be"'),
    ("stop", '""', '""'),
    ("model", "", ""),
    ("model", "''", "''"),
    ("model", "'", "'"),
    ("model", "don't", "don't"),
    ("model", "'a' or 'b'", "'a' or 'b'"),
]


@pytest.mark.parametrize(("name", "text", "value"), TYPED)
def test_an_argument_is_converted_to_the_type_of_its_option(name, text, value):
    converted = getattr(options_of(f"--{name}={text}"), name)
    assert (converted, type(converted)) == (value, type(value))


# (option, value in the config file, value)
ASSIGNED = [
    ("learning_rate", 1, 1.0),
    ("fsdp", True, True),
    ("top_k", None, None),
    ("top_p", 1, 1.0),
    ("stop", None, None),
    ("stop", '"quoted"', '"quoted"'),
    ("compile", False, False),
    ("compile", "auto", "auto"),
    ("model", "a=b", "a=b"),
    ("runs", ["a", "b"], ["a", "b"]),
]


@pytest.mark.parametrize(("name", "assigned", "value"), ASSIGNED)
def test_a_value_of_a_config_file_is_converted_to_the_type_of_its_option(
    config_file, name, assigned, value
):
    converted = getattr(options_of(config_file(f"{name} = {assigned!r}")), name)
    assert (converted, type(converted)) == (value, type(value))


# (option, text on the command line, types that the error names)
WRONG_TYPED = [
    ("batch_size", "1.5", ["int"]),
    ("batch_size", "", ["int"]),
    ("batch_size", "None", ["int"]),
    ("batch_size", "True", ["int"]),
    ("batch_size", "eight", ["int"]),
    ("learning_rate", "high", ["float"]),
    ("learning_rate", "None", ["float"]),
    ("fsdp", "yes", ["bool"]),
    ("fsdp", "2", ["bool"]),
    ("fsdp", "None", ["bool"]),
    ("top_k", "1.5", ["int", "None"]),
    ("top_p", "most", ["float", "None"]),
]


def words(message):
    return re.findall(r"\w+", message)


@pytest.mark.parametrize(("name", "text", "types"), WRONG_TYPED)
def test_a_wrong_type_on_the_command_line_is_refused_with_the_right_one(name, text, types):
    message = user_error(f"--{name}={text}")
    assert f"{name}={text}" in message
    assert set(types) <= set(words(message.replace(f"{name}={text}", "")))


# (option, value in the config file, types that the error names)
WRONG_ASSIGNED = [
    ("batch_size", True, ["int"]),
    ("batch_size", 1.0, ["int"]),
    ("batch_size", "8", ["int"]),
    ("batch_size", None, ["int"]),
    ("batch_size", [8], ["int"]),
    ("learning_rate", True, ["float"]),
    ("learning_rate", "1e-3", ["float"]),
    ("fsdp", "True", ["bool"]),
    ("fsdp", 0.0, ["bool"]),
    ("model", 3, ["str"]),
    ("model", None, ["str"]),
    ("top_k", 1.5, ["int", "None"]),
    ("compile", 2, ["bool", "str"]),
    ("runs", "a", ["list"]),
]


@pytest.mark.parametrize(("name", "assigned", "types"), WRONG_ASSIGNED)
def test_a_wrong_type_in_a_config_file_is_refused_with_the_right_one(
    config_file, name, assigned, types
):
    message = user_error(config_file(f"{name} = {assigned!r}"))
    assert f"{name}={assigned!r}" in message
    assert set(types) <= set(words(message.replace(f"{name}={assigned!r}", "")))


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "names"),
    [("--batchsize=8", ["batchsize", "batch_size"]), ("--xyzzy=8", ["xyzzy", "--help"])],
)
def test_an_unknown_option_is_refused_with_the_nearest_one_or_help(argument, names):
    message = user_error(argument)
    assert all(name in message for name in names)


def test_a_variable_of_a_config_file_that_is_no_option_is_refused(config_file):
    message = user_error(config_file("learnin_rate = 1e-3"))
    assert "learnin_rate" in message
    assert "learning_rate" in message


def test_a_hint_says_which_model_has_an_unknown_option():
    hint = {"window": "it is an option of model_swa"}.get
    assert "model_swa" in user_error("--window=5", parse=with_shape, hint=hint)


def test_an_option_without_a_hint_is_refused_with_the_nearest_one():
    hint = {"window": "it is an option of model_swa"}.get
    assert "batch_size" in user_error("--batch_sise=5", parse=with_shape, hint=hint)


def train_options(*argv):
    """Parse the options of train.py, with those of the plain model."""
    gpt_config = model_module("model").GPTConfig
    return configure_with_model(
        train.TrainConfig, list(argv), "", lambda _: gpt_config, models_with_option
    )


def sample_options(*argv):
    return configure(sample.SampleConfig, list(argv), "")


NANOGPT_TRAIN = (
    "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from "
    "wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size "
    "block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 "
    "beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile"
).split()
NANOGPT_SAMPLE = (
    "init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile"
).split()
TRAIN_NAMES = {
    *(field.name for field in fields(train.TrainConfig)),
    *config_fields("model"),
}
SAMPLE_NAMES = {field.name for field in fields(sample.SampleConfig)}
OTHERS = ["real_data", "profile", "lr", "epochs", "max_grad_norm", "n_kv_heads", "sliding_window"]


@pytest.mark.parametrize("name", sorted({*NANOGPT_TRAIN, *OTHERS} - TRAIN_NAMES))
def test_train_answers_an_option_name_of_nanogpt_or_others_with_ours(name):
    assert OTHER_NAMES[name] in user_error(f"--{name}=1", parse=train_options)


@pytest.mark.parametrize("name", sorted(set(NANOGPT_SAMPLE) - SAMPLE_NAMES))
def test_sample_answers_an_option_name_of_nanogpt_with_ours(name):
    assert OTHER_NAMES[name] in user_error(f"--{name}=1", parse=sample_options)


def test_sample_answers_out_dir_with_init_from():
    assert "--init_from" in user_error("--out_dir=out/x", parse=sample_options)


@pytest.mark.parametrize("parse", [train_options, sample_options])
def test_resume_of_nanogpt_is_answered_with_what_resumes_a_run(parse, config_file):
    for argument in ("--init_from=resume", config_file("init_from = 'resume'")):
        assert "same command" in user_error(argument, parse=parse)


def test_an_answer_names_no_option_that_the_program_lacks():
    assert "learning_rate" not in user_error("--lr=2", parse=sample_options)


def test_the_options_that_answer_other_names_exist():
    named = set()
    for answer in OTHER_NAMES.values():
        named.update(re.findall(r"--(\w+)", answer))
    assert named
    assert named <= TRAIN_NAMES | SAMPLE_NAMES


def test_a_missing_config_file_is_refused_and_its_folder_listed(config_file, tmp_path):
    config_file("", "other.py")
    message = user_error(str(tmp_path / "missing.py"))
    assert "missing.py" in message
    assert "other.py" in message


def test_a_config_file_in_a_missing_folder_is_refused(tmp_path):
    assert "missing.py" in user_error(str(tmp_path / "nowhere" / "missing.py"))


# (config file, line that the error names, type or text of the exception)
FAILING = [
    ("batch_size = 8\nmodel = = 3\n", 2, "SyntaxError"),
    ("zero = 0\n\nbatch_size = 8 // zero\n", 3, "ZeroDivisionError"),
    # the line in the function
    ("def f():\n    return int('x')\n\n\nbatch_size = f()\n", 2, "ValueError"),
    # not the line in the library
    ("import json\nbatch_size = json.loads('{')\n", 2, "JSONDecodeError"),
    # not the line in the imported module
    ("import math\nimport broken_module\n", 2, "SyntaxError"),
    ("raise ValueError('first\\nsecond')", 1, "first second"),
]


@pytest.mark.parametrize(("text", "line", "error"), FAILING)
def test_an_exception_in_a_config_file_names_file_and_line(
    config_file, tmp_path, monkeypatch, text, line, error
):
    monkeypatch.syspath_prepend(tmp_path)
    config_file("\n\n\n\nx = = 1", "broken_module.py")
    path = config_file(text)
    message = user_error(path)
    assert path in message
    assert re.search(rf"\bline {line}\b", message)
    assert error in message


@pytest.mark.parametrize(
    "content", [b"batch_size = '\xff'", b"batch_size = 8\x00"], ids=["not UTF-8", "null byte"]
)
def test_a_config_file_that_is_not_text_is_refused(tmp_path, content):
    (tmp_path / "config.py").write_bytes(content)
    assert f"{tmp_path}/config.py" in user_error(f"{tmp_path}/config.py")


@pytest.mark.parametrize("argument", ["--fsdp", "-fsdp=True", "-f", "--", "-"])
def test_an_option_without_a_value_is_refused(argument):
    message = user_error(argument)
    assert argument in message
    assert "--key=value" in message


def test_a_positional_argument_is_refused_by_default():
    assert "quickstart" in user_error("quickstart")


# Positionals ----------------------------------------------------------------------------------


def test_a_positional_is_converted_to_the_type_of_its_option():
    assert options_of("8", positional="batch_size").batch_size == 8


def test_a_second_positional_is_refused():
    assert "second" in user_error("first", "second", positional="model")


def test_a_list_takes_all_positionals_and_replaces_that_of_a_config_file(config_file):
    path = config_file("runs = ['out/a']")
    options = options_of(path, "out/b", "--batch_size=2", "out/c", positional="runs")
    assert options.runs == ["out/b", "out/c"]


@pytest.mark.parametrize("argv", [["out/a", "--runs=out/b"], ["--runs=out/b"]])
def test_a_list_is_not_read_from_an_option(argv):
    message = user_error(*argv, positional="runs")
    assert "runs=out/b" in message
    assert "list" in message


# Bounds ---------------------------------------------------------------------------------------


def test_an_option_at_its_lower_bound_or_none_is_accepted():
    check_minimum(Options(batch_size=16, top_k=None), 16, "batch_size", "top_k")


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (-0.5, "0"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (1e30, "2**63"),
        (2**63, "2**63"),
        (10**400, "2**63"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_bound_that_it_breaks(value, bound):
    with pytest.raises(UserError) as error:
        check_minimum(Options(learning_rate=value), 0, "batch_size", "learning_rate")
    message = str(error.value)
    assert f"learning_rate={value}" in message
    assert bound in message.replace(f"learning_rate={value}", "")


# The options of a model -----------------------------------------------------------------------


def test_the_options_of_the_model_that_are_given_come_as_a_dict(config_file):
    filled, shape = with_shape(config_file("n_layer = 3"), "--batch_size=2", "--n_head=5")
    assert filled == Options(batch_size=2)
    assert shape == {"n_layer": 3, "n_head": 5}


def test_the_filled_options_choose_the_model():
    received = []

    def choose_model(options):
        received.append(options)
        return Shape

    configure_with_model(Options, ["--model=model_swa"], "", choose_model, lambda name: "")
    assert received == [Options(model="model_swa")]


def test_an_option_of_the_model_with_a_wrong_type_is_refused():
    message = user_error("--n_layer=x", parse=with_shape)
    assert "n_layer=x" in message
    assert "int" in message


def test_an_unknown_option_is_refused_with_the_nearest_one_of_the_model():
    message = user_error("--n_laier=3", parse=with_shape)
    assert "n_laier" in message
    assert "n_layer" in message


# Help -----------------------------------------------------------------------------------------

HELP = """
  Shape:
    --batch_size: int = 16                       sequences in one forward
    --learning_rate: float = 0.0006              peak
  Rest:
    --fsdp: bool = False                         shard the model
    --model: str = model                         the model file
    --stop: str | None = None                    text that ends a sample
    --top_k: int | None = 200                    sample among the k likeliest
    --top_p: float | None = None                 fraction of the probability
    --compile: bool | str = auto                 torch.compile
    --runs: list
"""


@pytest.mark.parametrize(("flag", "parse"), [("--help", options_of), ("-h", with_shape)])
def test_help_shows_group_type_default_and_comment_of_each_option(capsys, flag, parse):
    with pytest.raises(SystemExit) as end:
        parse(flag)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("A program.")
    assert HELP.rstrip() in text
    assert "folders of runs" in text
    has_model_options = "--n_layer: int = 12" in text and "query heads" in text
    assert has_model_options == (parse is with_shape)


@dataclass
class Formatted:
    first: str | None = (
        None  # a text, as a formatter breaks a line that is too long
    )  # fmt: skip
    second: int = 3
    third: float = (
        1.0
    )  # a text after the value  # fmt: skip


def test_help_shows_the_comment_of_a_field_over_several_lines(capsys):
    with pytest.raises(SystemExit):
        configure(Formatted, ["--help"], "")
    first, second, third = capsys.readouterr().out.splitlines()[-3:]
    assert "a text, as" in first
    assert second == "    --second: int = 3"
    assert "a text after" in third


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.__module__)
def test_every_option_of_every_program_has_a_text_in_help(options, capsys):
    with pytest.raises(SystemExit):
        configure(options, ["--help"], "")
    lines = re.findall(r"^ +--(\w+)(.*)", capsys.readouterr().out, re.M)
    assert [name for name, _ in lines] == list(options.__annotations__)  # without inherited ones
    assert [name for name, rest in lines if len("    --" + name + rest) <= 49] == []


# Programs -------------------------------------------------------------------------------------


def failing(error):
    """Return a main() that raises this error."""

    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("no data: make it"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_user_error_or_an_interrupt_is_one_line_on_stderr_and_a_status(capsys, error, status):
    with pytest.raises(SystemExit) as end:
        run_program(failing(error), [])
    out, err = capsys.readouterr()
    assert end.value.code == status
    assert out == ""
    assert err.count("\n") == 1
    assert str(error) in err


def test_an_error_that_rank_0_prints_is_only_a_status_on_another_rank(capsys):
    with pytest.raises(SystemExit) as end:
        run_program(failing(OtherRankError("no data")), [])
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("main", ["print", "lambda argv: sys.exit(print())"])  # as for --help
def test_a_closed_pipe_is_status_1_and_no_line(main, unbuffered):
    code = f"import sys; from common.errors import run_program; run_program({main}, [])"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as pipe:
        command = [sys.executable, "-c", code]
        completed = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.PIPE
        )
    assert (completed.returncode, completed.stderr) == (1, b"")


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(AssertionError):
        run_program(failing(AssertionError("a bug")), [])
