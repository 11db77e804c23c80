"""SIGKILL at any file operation of prepare_data.py or an export, as in test_kills.py.

pytest -m slow tests/robustness/test_data_kills.py    at each operation; unmarked is a seeded sample
"""

import pytest
from data_commands import COMMANDS, SHARDS, dataset_in, export_run, serve, start_of
from faults import EFFORTS, Forked, failed_cases, files_of, kill, needs_fork, run_in

from common.dataloader import Loader
from common.errors import UserError

pytestmark = needs_fork


KILLED = {}  # what the fixture `killed` returned
each_effort = pytest.mark.parametrize("count", EFFORTS)


@pytest.fixture
def killed(hub, tmp_path_factory, name, count):
    """Kill a command of COMMANDS at so many operations, once per module."""
    serve(hub)
    if (name, count) not in KILLED:
        folder = tmp_path_factory.mktemp("killed")
        call, make = COMMANDS[name]
        KILLED[name, count] = kill(call, "data", start_of(make, folder), folder, count)
    return KILLED[name, count]


@each_effort
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_the_uninterrupted_one(killed):
    expected = files_of(killed.finished)

    def has_right_result(folder):
        run_in(folder, killed.call)
        return files_of(folder) == expected

    assert failed_cases(killed, has_right_result) == []


@each_effort
@pytest.mark.parametrize("name", ["text", "changed", "tokenizer", "import"])
def test_a_kill_leaves_the_old_dataset_the_new_one_or_none(killed):
    start = killed.finished.with_name("start")
    allowed = [None, dataset_in(start), dataset_in(killed.finished)]
    assert failed_cases(killed, lambda folder: dataset_in(folder) in allowed) == []


@each_effort
@pytest.mark.parametrize("name", ["fineweb", "more fineweb"])
def test_a_killed_fineweb_has_whole_shards_or_is_refused(killed):
    def has_right_result(folder):
        try:
            tokens = Loader(folder / "data/fineweb", block_size=8, vocab_size=50257, seed=0).n_train
        except UserError:
            return True
        return tokens in (len(SHARDS[1]), len(SHARDS[1]) + len(SHARDS[2]))

    assert failed_cases(killed, has_right_result) == []


@each_effort
def test_a_killed_export_is_complete_or_can_be_repeated(tiny_run, workdir, tmp_path_factory, count):
    killed = kill(export_run, "data", workdir, tmp_path_factory.mktemp("killed"), count)
    expected = files_of(killed.finished)

    def has_right_result(folder):
        was_complete = (folder / "data/exported").exists()
        outcome = Forked(export_run, folder).finish()
        assert outcome.status == (2 if was_complete else 0), outcome.err
        return files_of(folder) == expected

    assert failed_cases(killed, has_right_result) == []
