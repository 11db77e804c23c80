"""Options: config files and the command line fill a dataclass, and what is wrong is one line."""

from dataclasses import dataclass, field

import pytest

from configurator import UserError, at_least, configure, program


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


def complaint(*argv, **how):
    """The message of the UserError that these arguments raise: one line."""
    with pytest.raises(UserError) as error:
        options_of(*argv, **how)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# Where values come from -----------------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    assert options_of() == Options()


def test_a_config_file_sets_options(config_file):
    assert options_of(config_file("batch_size = 4\nmodel = 'model_rope'")) == Options(batch_size=4, model="model_rope")


def test_a_config_file_may_calculate(config_file):
    assert options_of(config_file("batch_size = 2**3 * 5\nlearning_rate = batch_size / 100")).learning_rate == 0.4


def test_imported_modules_are_not_options(config_file):
    assert options_of(config_file("import math\nbatch_size = math.isqrt(49)")) == Options(batch_size=7)


def test_functions_are_not_options(config_file):
    text = "from math import isqrt\ndef half(n):\n    return isqrt(n) // 2\nbatch_size = half(100)"
    assert options_of(config_file(text)) == Options(batch_size=5)


def test_names_that_begin_with_underscore_are_not_options(config_file):
    assert options_of(config_file("_tokens = 4096\nbatch_size = _tokens // 1024")) == Options(batch_size=4)


def test_a_variable_of_a_config_file_that_is_no_option_is_refused(config_file):
    assert "tokens" in complaint(config_file("tokens = 4096\nbatch_size = tokens // 1024"))


def test_the_later_config_file_wins(config_file):
    a, b = config_file("batch_size = 1\ntop_k = 5", "a.py"), config_file("batch_size = 2", "b.py")
    assert options_of(a, b) == Options(batch_size=2, top_k=5)


def test_an_option_after_a_config_file_wins(config_file):
    assert options_of(config_file("batch_size = 1"), "--batch_size=3").batch_size == 3


def test_a_config_file_after_an_option_wins(config_file):
    assert options_of("--batch_size=3", config_file("batch_size = 1")).batch_size == 1


def test_the_later_of_two_options_wins():
    assert options_of("--batch_size=3", "--batch_size=5").batch_size == 5


# Typed values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-3", "learning_rate", 0.001),
        ("--batch_size=1_000", "batch_size", 1000),
        ("--batch_size=-1", "batch_size", -1),
        ("--fsdp=true", "fsdp", True),
        ("--fsdp=True", "fsdp", True),
        ("--fsdp=1", "fsdp", True),
        ("--fsdp=false", "fsdp", False),
        ("--fsdp=False", "fsdp", False),
        ("--fsdp=0", "fsdp", False),
        ("--top_k=None", "top_k", None),
        ("--top_k=7", "top_k", 7),
        ("--top_p=1", "top_p", 1.0),
        ("--stop=None", "stop", None),
        ("--stop=7", "stop", "7"),
        ("--model=None", "model", "None"),
        ("--model=model_mine", "model", "model_mine"),
        ("--model='model_mine'", "model", "model_mine"),
        ('--model="model_mine"', "model", "model_mine"),
        ("--model=", "model", ""),
        ("--model=''", "model", ""),
        ("--model='", "model", "'"),
        ("--model=don't", "model", "don't"),
        ("--model='a' or 'b'", "model", "'a' or 'b'"),
        ("--model=a=b", "model", "a=b"),
        ("--model=--x=y", "model", "--x=y"),
        ("--model=wörter und mehr", "model", "wörter und mehr"),
        ("--compile=auto", "compile", "auto"),
        ("--compile=false", "compile", False),
    ],
)
def test_an_argument_is_read_as_its_option_says(argument, name, value):
    got = getattr(options_of(argument), name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ("fsdp = True", "fsdp", True),
        ("top_k = None", "top_k", None),
        ("top_p = 1", "top_p", 1.0),
        ("stop = None", "stop", None),
        ("stop = '\"quoted\"'", "stop", '"quoted"'),
        ("model = 'a=b'", "model", "a=b"),
        ("compile = False", "compile", False),
        ("compile = 'auto'", "compile", "auto"),
        ("runs = ['a', 'b']", "runs", ["a", "b"]),
    ],
)
def test_a_value_of_a_config_file_is_taken_as_its_option_says(config_file, line, name, value):
    got = getattr(options_of(config_file(line)), name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--batch_size=1.5", "int"),
        ("--batch_size=", "int"),
        ("--batch_size=None", "int"),
        ("--batch_size=True", "int"),
        ("--batch_size=eight", "int"),
        ("--learning_rate=high", "float"),
        ("--learning_rate=None", "float"),
        ("--fsdp=yes", "bool"),
        ("--fsdp=2", "bool"),
        ("--fsdp=None", "bool"),
        ("--top_k=1.5", "int or None"),
        ("--top_p=most", "float or None"),
    ],
)
def test_a_wrong_type_on_the_command_line_is_refused_with_the_right_one(argument, expected):
    message = complaint(argument)
    assert argument.removeprefix("--") in message and f"expected {expected}" in message


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("batch_size = True", "batch_size", "int"),
        ("batch_size = 1.0", "batch_size", "int"),
        ("batch_size = '8'", "batch_size", "int"),
        ("batch_size = None", "batch_size", "int"),
        ("batch_size = [8]", "batch_size", "int"),
        ("learning_rate = True", "learning_rate", "float"),
        ("learning_rate = '1e-3'", "learning_rate", "float"),
        ("fsdp = 'True'", "fsdp", "bool"),
        ("fsdp = 0.0", "fsdp", "bool"),
        ("model = 3", "model", "str"),
        ("model = None", "model", "str"),
        ("top_k = 1.5", "top_k", "int or None"),
        ("compile = 2", "compile", "bool or str"),
        ("runs = 'a'", "runs", "list"),
    ],
)
def test_a_wrong_type_in_a_config_file_is_refused_with_the_right_one(config_file, line, name, expected):
    message = complaint(config_file(line))
    assert name in message and message.endswith(f"expected {expected}")


# What is wrong --------------------------------------------------------------------------------------------------------


def test_an_unknown_option_names_the_nearest():
    message = complaint("--batchsize=8")
    assert "batchsize" in message and "did you mean batch_size?" in message


def test_an_unknown_name_in_a_config_file_names_the_nearest(config_file):
    assert "did you mean learning_rate?" in complaint(config_file("learnin_rate = 1e-3"))


def test_an_unknown_option_unlike_any_other_points_to_help():
    assert "--help" in complaint("--xyzzy=8")


def test_elsewhere_says_where_an_unknown_option_is_known():
    message = complaint("--window=5", elsewhere=lambda name: f"{name} is an option of model_swa")
    assert "window is an option of model_swa" in message


def test_an_option_that_is_known_nowhere_else_still_names_the_nearest():
    assert "did you mean batch_size?" in complaint("--batch_sise=5", elsewhere=lambda name: "")


def test_a_missing_config_file_is_refused_and_the_folder_listed(config_file, tmp_path):
    config_file("", "there.py")
    message = complaint(str(tmp_path / "gone.py"))
    assert "gone.py" in message and "there.py" in message


def test_a_missing_config_folder_is_refused(tmp_path):
    assert "gone.py" in complaint(str(tmp_path / "nowhere" / "gone.py"))


def test_a_syntax_error_in_a_config_file_names_file_and_line(config_file):
    path = config_file("batch_size = 8\nmodel = = 3\n")
    assert f"{path}, line 2: SyntaxError" in complaint(path)


def test_an_exception_in_a_config_file_names_file_and_line(config_file):
    path = config_file("zero = 0\n\nbatch_size = 8 // zero\n")
    assert f"{path}, line 3: ZeroDivisionError" in complaint(path)


def test_an_exception_within_a_function_of_a_config_file_names_the_function_s_line(config_file):
    path = config_file("def f():\n    return int('x')\n\n\nbatch_size = f()\n")
    assert f"{path}, line 2: ValueError" in complaint(path)


def test_an_exception_in_a_library_names_the_config_file_s_line(config_file):
    path = config_file("import json\nbatch_size = json.loads('{')\n")
    assert f"{path}, line 2: JSONDecodeError" in complaint(path)


def test_a_syntax_error_in_an_imported_module_names_the_line_that_imports_it(config_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config_file("\n\n\n\nx = = 1", "broken_module.py")
    path = config_file("import math\nimport broken_module\n")
    assert f"{path}, line 2: SyntaxError" in complaint(path)


def test_an_exception_of_several_lines_becomes_one_line(config_file):
    assert "first" in complaint(config_file("raise ValueError('first\\nsecond')"))


@pytest.mark.parametrize("content", [b"batch_size = '\xff'", b"batch_size = 8\x00"], ids=["not UTF-8", "null byte"])
def test_a_config_file_that_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "config.py"
    path.write_bytes(content)
    assert str(path) in complaint(str(path))


@pytest.mark.parametrize("argument", ["--fsdp", "-fsdp=True", "-f", "--", "-"])
def test_an_option_without_value_is_refused(argument):
    message = complaint(argument)
    assert message.startswith(argument) and "--key=value" in message


def test_a_stray_positional_is_refused():
    assert "quickstart" in complaint("quickstart")


# Positionals ----------------------------------------------------------------------------------------------------------


def test_a_positional_fills_its_option():
    assert options_of("model_rope", positional="model").model == "model_rope"


def test_a_second_positional_is_refused_where_there_is_one_only():
    message = complaint("first", "second", positional="model")
    assert "first" in message and "second" in message


def test_a_list_positional_takes_all():
    assert options_of("out/a", "--batch_size=2", "out/b", positional="runs").runs == ["out/a", "out/b"]


def test_a_positional_is_read_as_its_option_says():
    assert options_of("8", positional="batch_size").batch_size == 8


def test_positionals_replace_the_list_of_a_config_file(config_file):
    path = config_file("runs = ['out/a']")
    assert options_of(path, "out/b", "out/c", positional="runs").runs == ["out/b", "out/c"]


@pytest.mark.parametrize("argv", [["out/a", "--runs=out/b"], ["--runs=out/b"]])
def test_a_list_is_not_read_from_an_option(argv):
    assert "expected list" in complaint(*argv, positional="runs")


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_an_option_at_its_lowest_value_is_accepted():
    at_least(16, Options(batch_size=16), "batch_size")


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_an_option_below_its_lowest_value_or_not_finite_is_refused_with_both_numbers(value):
    with pytest.raises(UserError, match=f"learning_rate={value} .*at least 0"):
        at_least(0, Options(learning_rate=value), "batch_size", "learning_rate")


def test_an_option_that_is_none_has_no_lowest_value():
    at_least(1, Options(top_k=None), "top_k")


# A second dataclass ---------------------------------------------------------------------------------------------------


def test_more_gives_the_options_of_the_second_dataclass_that_were_given(config_file):
    filled, rest = options_of(config_file("n_layer = 3"), "--batch_size=2", "--n_head=5", more=lambda options: Shape)
    assert (filled, rest) == (Options(batch_size=2), {"n_layer": 3, "n_head": 5})


def test_more_sees_the_filled_options():
    seen = []
    options_of("--model=model_swa", more=lambda options: seen.append(options) or Shape)
    assert seen == [Options(model="model_swa")]


def test_more_converts_its_options_too():
    assert "expected int" in complaint("--n_layer=many", more=lambda options: Shape)


def test_an_unknown_option_may_be_near_one_of_the_second_dataclass():
    assert "did you mean n_layer?" in complaint("--n_layers=3", more=lambda options: Shape)


# Help -----------------------------------------------------------------------------------------------------------------


def help_of(capsys, *argv, **how):
    with pytest.raises(SystemExit) as end:
        options_of(*argv, **how)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_begins_with_the_program_s_text_and_exits_0(capsys, flag):
    assert help_of(capsys, flag).startswith("A program.")


@pytest.mark.parametrize(
    ("name", "kind", "default", "comment"),
    [
        ("batch_size", "int", "16", "sequences in one forward"),
        ("learning_rate", "float", "0.0006", "the highest"),
        ("fsdp", "bool", "False", "shard the model"),
        ("model", "str", "model", "the model file"),
        ("stop", "str | None", "None", "text that ends a sample"),
        ("compile", "bool | str", "auto", "torch.compile"),
        ("runs", "list", "", "folders of runs"),
    ],
)
def test_help_shows_type_default_and_comment_of_each_option(capsys, name, kind, default, comment):
    (line,) = [line for line in help_of(capsys, "--help").splitlines() if line.strip().startswith(f"--{name}:")]
    assert all(part in line for part in (kind, default, comment))


def test_help_has_the_group_titles_in_order(capsys):
    text = help_of(capsys, "--help")
    assert -1 < text.find("Shape") < text.find("--batch_size") < text.find("Rest") < text.find("--fsdp")


def test_help_shows_the_second_dataclass_too(capsys):
    text = help_of(capsys, "--help", more=lambda options: Shape)
    assert "--n_layer: int = 12" in text and "query heads" in text


# The program ----------------------------------------------------------------------------------------------------------


def test_a_program_returns_what_its_main_returns():
    assert program(lambda argv: argv)(["a"]) == ["a"]


def test_a_user_error_ends_a_program_with_one_line_on_stderr_and_status_2(capsys):
    @program
    def main():
        raise UserError("no data: make it")

    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert "no data: make it" in err


def test_an_interrupted_program_ends_with_status_130_and_no_traceback(capsys):
    @program
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_bug_keeps_its_traceback():
    @program
    def main():
        raise AssertionError("a bug")

    with pytest.raises(AssertionError):
        main()
