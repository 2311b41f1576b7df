"""The engine as a library: partial early-exit models, served to many sequences at once.

from helios.engine import Engine, SamplingParams
engine = Engine.load("models/helios-prose", depth=6)
for token in engine.generate("And the LORD said", SamplingParams(max_tokens=32)):
    print(token.text, end="", flush=True)
"""

from helios.engine.engine import Engine
from helios.engine.scheduling.sequence import Finish, FinishReason, GeneratedToken, Output
from helios.engine.settings import EngineSettings
from helios.modes import ExitMode
from helios.sampling import SamplingParams

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
