"""common/distributed.py: how the environment describes the ranks; errors name its variables.

Runs in several processes are in test_distributed.py and test_launches.py.
"""

import socket

import pytest
import torch
import torch.distributed as dist
from conftest import arguments
from spoiled import spoiled

import train
from common.distributed import ProcessGroup, describe_lost_rank
from common.errors import UserError


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets the variables of the only rank of a run, and then others."""

    def set_variables(**others):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in (variables | others).items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def connected(monkeypatch):
    """Let the ranks count as connected, without any connection."""
    monkeypatch.setattr(ProcessGroup, "_init_process_group", lambda group, timeout: None)
    monkeypatch.setattr(ProcessGroup, "any_rank", lambda group, flag: flag)


def connection_error():
    """Return the message of the UserError about a connection that fails; it is one line."""
    with pytest.raises(UserError) as error:
        ProcessGroup(timeout=1)
    assert not dist.is_initialized()
    assert "\n" not in str(error.value)
    return str(error.value)


# Wrong variables ------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", ["^lo", "none9"])
def test_an_interface_that_does_not_exist_is_named_with_its_variable(environment, interface):
    environment(GLOO_SOCKET_IFNAME=interface)
    message = connection_error()
    assert f"GLOO_SOCKET_IFNAME={interface}" in message
    assert all(name in message for _, name in socket.if_nameindex())


@pytest.mark.parametrize("port", ["x", "", "-1", "70000"])
def test_a_port_that_is_none_is_named_with_its_variable(environment, port):
    environment(MASTER_PORT=port)
    assert f"MASTER_PORT={port}" in connection_error()


def test_a_port_that_is_taken_is_named_with_its_variable(environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment(MASTER_PORT=port)
        assert f"MASTER_PORT={port}" in connection_error()


def test_a_missing_address_is_named_with_its_variable(environment, monkeypatch):
    environment()
    monkeypatch.delenv("MASTER_ADDR")
    assert "MASTER_ADDR" in connection_error()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "", "1.0"])
def test_a_rank_or_world_size_that_is_no_integer_is_named(environment, connected, name, value):
    environment(**{name: value})
    assert f"{name}={value} " in connection_error()


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("-1", "2"), ("0", "0")])
def test_a_rank_outside_of_the_world_size_is_refused(environment, connected, rank, world_size):
    environment(RANK=rank, WORLD_SIZE=world_size)
    message = connection_error()
    assert f"RANK={rank}" in message and f"WORLD_SIZE={world_size}" in message


def test_a_world_size_without_a_rank_is_not_that_of_a_run(monkeypatch):
    """As in the environment of a batch job that starts one process."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ProcessGroup(timeout=1).world_size == 1


# Several machines -----------------------------------------------------------------------------

VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@pytest.mark.parametrize(
    ("variables", "warns"),
    [
        ({"GROUP_WORLD_SIZE": "2"}, True),
        ({"GROUP_WORLD_SIZE": "2", VARIABLE: "0"}, True),
        ({"GROUP_WORLD_SIZE": "2", VARIABLE: "1"}, False),
        ({"GROUP_WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"GROUP_WORLD_SIZE": "1"}, False),
        ({}, False),  # not torchrun
    ],
)
def test_rank_0_of_several_machines_warns_without_the_variable(
    environment, connected, monkeypatch, capsys, variables, warns
):
    monkeypatch.delenv(VARIABLE, raising=False)
    environment(WORLD_SIZE="2", **variables)
    ProcessGroup(timeout=1)
    assert (VARIABLE in capsys.readouterr().err) == warns


# The end --------------------------------------------------------------------------------------


@pytest.fixture
def destroyed(monkeypatch):
    """Return a list that gets an entry when a run asks to destroy the process group."""
    calls = []
    monkeypatch.setattr(ProcessGroup, "destroy_at_exit", lambda group: calls.append(group))
    return calls


def test_a_run_that_ends_well_destroys_the_process_group(workdir, destroyed):
    train.main(arguments(max_steps=1))
    assert len(destroyed) == 1


def test_an_error_that_all_ranks_agree_on_destroys_the_process_group(workdir, destroyed):
    with spoiled("loss", "nan", 0), pytest.raises(UserError):
        train.main(arguments(max_steps=1))
    assert len(destroyed) == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("no memory")])
def test_an_error_of_one_rank_does_not_wait_for_the_others(workdir, destroyed, monkeypatch, error):
    def failing_step(run):
        raise error

    monkeypatch.setattr(train, "train_step", failing_step)
    with pytest.raises((RuntimeError, UserError)):
        train.main(arguments(max_steps=1))
    assert destroyed == []


@pytest.mark.parametrize("kind", [dist.DistBackendError, dist.DistNetworkError])
def test_an_error_of_nccl_or_of_the_network_is_a_lost_rank(kind):
    error = kind("NCCL communicator was aborted on rank 0. More\nlines")
    assert describe_lost_rank(error) == "NCCL communicator was aborted on rank 0"
