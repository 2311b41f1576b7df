"""Everything that Helios keeps in Redis: keys, contents and version. This module owns the schema.

| key | type | contents |
| --- | --- | --- |
| `helios:v1:worker:<id>` | string, JSON, expires | a worker's lease (`helios.registry`) |
| `helios:v1:prompts` | stream, capped, entries expire | ids of recent prompts, sampled by gateways |
| `helios:v1:profile:<model>` | string, JSON | performance history of one model (`helios.history`) |
| `helios:v1:examples:<model>` | list of JSON, capped | what routers learn from (`helios.examples`) |
| `helios:v1:decisions` | stream, capped, append-only | the controller's decision record |
| `helios:v1:controller:state` | hash | orders (pins, plans, mode), SLO, and what a controller resumes from |
| `helios:v1:controller:router` | string, JSON | the last router (`helios.routing.router`) |
| `helios:v1:controller:leader` | string, expires | the leading controller and its fencing number |
| `helios:v1:controller:fence` | integer | the last fencing number given out |
| `helios:v1:probe:<id>` | string, expires | tests whether Redis takes writes (`helios.redis_outage`) |

A new layout gets a new version in its keys, so that old and new versions never read each other's entries.
"""

VERSION = 1

_ROOT = f"helios:v{VERSION}:"

WORKER_PREFIX = _ROOT + "worker:"
PROFILE_PREFIX = _ROOT + "profile:"
# Matches profiles of every version, so that those of other versions can be reported.
PROFILE_PATTERN = "helios:v*:profile:*"
EXAMPLES_PREFIX = _ROOT + "examples:"
PROMPTS = _ROOT + "prompts"
DECISIONS = _ROOT + "decisions"
CONTROLLER_STATE = _ROOT + "controller:state"
ROUTER = _ROOT + "controller:router"
CONTROLLER_LEADER = _ROOT + "controller:leader"
CONTROLLER_FENCE = _ROOT + "controller:fence"
PROBE_PREFIX = _ROOT + "probe:"
