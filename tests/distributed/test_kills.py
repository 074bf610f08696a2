"""A run that is killed again and again, and started by the same command, equals one that was not killed."""

import pytest
from support.kills import main


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "zero3"], ids=str)
def test_a_killed_run_equals_one_that_was_not(tmp_path, engine, capsys):
    more = ["--engine", engine] if engine else []
    status = main([str(tmp_path), "--kills", "3", "--steps", "40" if engine is None else "24", "--seed", "5", *more])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count("kill ") == 3
    assert "in checkpoint-" in printed
