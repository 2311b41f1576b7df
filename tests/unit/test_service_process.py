"""A service says that it is ready when nothing of its start can hold it up any more."""

import gc

import pytest

from helios import service_process


def test_what_is_there_when_a_service_is_ready_is_left_alone_by_the_collector(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = gc.get_freeze_count()
    try:
        service_process.say_ready("127.0.0.1:1")
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
    assert capsys.readouterr().out == "ready address=127.0.0.1:1\n"
