"""The phases of the demo's traffic."""

from bench.load.traffic import Phase
from bench.texts import held_out

# Streams that are open at once.
STREAMS = 32
# Served before the traffic, so that it does not look like a drift from what was served earlier.
LEAD_IN = Phase("lead-in", (next(iter(held_out.DOMAINS)),), parts=(5,))
PHASES = (
    *(Phase(domain, (domain,), parts=(0, 2, 4)) for domain in held_out.DOMAINS),
    Phase("mix", tuple(held_out.DOMAINS), parts=(1, 3)),
)
