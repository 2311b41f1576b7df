"""`helios bench paper`: checks the claims of the HELIOS paper (arXiv 2504.10724), section by section.

The sections measure the engine alone. Only two start services: `control` measures what profiling and control
cost, and `served` what a plan for each request is worth.
"""

# The sections in order. The command line reads only this, so it need not import them.
SECTION_NAMES = (
    "curve",
    "baselines",
    "memory",
    "shape",
    "insights",
    "saturation",
    "policy",
    "control",
    "served",
    "reloads",
)
