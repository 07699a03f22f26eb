"""Options that all commands share."""

import pytest

from runtime_jax.cli import CommandLine


def fail(args, overrides):
    raise ValueError("no")


@pytest.mark.parametrize("arguments", [["--traceback", "run"], ["run", "--traceback"]])
def test_a_traceback_is_asked_for_before_or_after_the_command(arguments):
    line = CommandLine("program", None)
    line.command("run", fail, "Fails.")
    with pytest.raises(ValueError, match="no"):
        line.main(arguments)
    assert line.main(["run"]) == 1
