"""Another engine can replace this one: the worker's code for engines needs neither torch nor Numba."""

import subprocess
import sys

WITHOUT_TORCH = """
import sys
from helios.engine.interface import ServingEngine
loaded = {"torch", "numba"} & set(sys.modules)
assert not loaded, loaded
"""


def test_an_engine_can_be_implemented_without_torch_and_numba() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
