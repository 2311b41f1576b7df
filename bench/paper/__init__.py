"""`helios bench paper`: HELIOS against the paper's claims (arXiv 2504.10724), section by section.

The sections measure the engine alone. Only `control` starts services: it measures what profiling and control
cost.
"""

# The sections in their order, for the command line, which does not wait for their imports.
SECTION_NAMES = (
    "curve",
    "baselines",
    "memory",
    "shape",
    "insights",
    "saturation",
    "policy",
    "control",
    "reloads",
)
