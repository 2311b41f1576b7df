from typing import get_args

from helios.modes import ExitMode, ExitModeName, Precision, PrecisionName


def test_settings_know_the_same_modes_and_precisions_as_the_engine() -> None:
    assert get_args(ExitModeName) == tuple(ExitMode)
    assert get_args(PrecisionName) == tuple(Precision)
