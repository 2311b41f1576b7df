"""The engine as a library: it serves partial early-exit models to many sequences at once.

from helios.engine import Engine, SamplingParams
engine = Engine.load("models/helios-prose", depth=6)
for token in engine.generate("And the LORD said", SamplingParams(max_tokens=32)):
    print(token.text, end="", flush=True)
"""

from typing import TYPE_CHECKING

from helios.engine.interface import Finish, FinishReason, GeneratedToken, Output
from helios.modes import ExitMode
from helios.sampling import SamplingParams

if TYPE_CHECKING:
    from helios.engine.engine import Engine
    from helios.engine.settings import EngineSettings
else:

    def __getattr__(name: str) -> object:
        """Imports what needs torch and Numba at first use, because `interface.py` must work without them."""
        if name == "Engine":
            from helios.engine.engine import Engine  # noqa: PLC0415

            return Engine
        if name == "EngineSettings":
            from helios.engine.settings import EngineSettings  # noqa: PLC0415

            return EngineSettings
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Engine",
    "EngineSettings",
    "ExitMode",
    "Finish",
    "FinishReason",
    "GeneratedToken",
    "Output",
    "SamplingParams",
]
