"""What all commands share: options, and which of them run as several processes."""

import re
from pathlib import Path

import pytest

import mergevq_jax.cli
import tokenverse_jax.cli
from runtime_jax.cli import CommandLine

PODS = Path(__file__).parents[2] / "docs" / "pods.md"


def fail(args, overrides):
    raise ValueError("no")


@pytest.mark.parametrize("arguments", [["--traceback", "run"], ["run", "--traceback"]])
def test_a_traceback_is_asked_for_before_or_after_the_command(arguments):
    line = CommandLine("program", None)
    line.command("run", fail, "Fails.")
    with pytest.raises(ValueError, match="no"):
        line.main(arguments)
    assert line.main(["run"]) == 1


def test_commands_in_groups(capsys):
    line = CommandLine("program", None)
    group = line.group("measure", "Measures.")
    ran = []
    for name in ("one", "two"):
        parser = group.command(name, lambda args, _: ran.append((args.command, args.size)), name, several=name == "two")
        parser.add_argument("--size", type=int, default=3)
    group.command("fail", fail, "Fails.")
    assert line.main(["measure", "one"]) == line.main(["measure", "two", "--size", "4"]) == 0
    assert ran == [("measure one", 3), ("measure two", 4)]
    assert list(line.parsers) == ["measure one", "measure two", "measure fail"]
    assert line.main(["measure", "fail"]) == 1 and capsys.readouterr().err == "program measure fail: no\n"
    for before in (["--traceback", "measure", "fail"], ["measure", "--traceback", "fail"]):
        with pytest.raises(ValueError, match="no"):
            line.main(before)
    with pytest.raises(SystemExit):
        line.main(["measure"])
    assert "command" in capsys.readouterr().err


def test_docs_list_the_commands_that_run_as_several_processes():
    lines = [module._command_line() for module in (mergevq_jax.cli, tokenverse_jax.cli)]
    several = {
        f"{line.prog} {name}"
        for line in lines
        for name, parser in line.parsers.items()
        if parser.get_default("several")
    }
    rows = [
        row.split("|")[1] for row in PODS.read_text().splitlines() if row.startswith(("| `mergevq ", "| `tokenverse "))
    ]
    assert several == set(re.findall(r"`(.+?)`", " ".join(rows)))


@pytest.mark.parametrize("command", ["generate --prompt x", "bench --config x --workdir x", "scenes"])
def test_other_commands_refuse_several_processes(command, monkeypatch, capsys):
    names = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert tokenverse_jax.cli.main(command.split()) == 1
    error = capsys.readouterr().err
    assert (
        error == f"tokenverse {command.split()[0]}: this command runs as one process, but the environment describes 2\n"
    )
