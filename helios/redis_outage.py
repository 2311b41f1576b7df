"""What is done in Redis beside the data path: tried again while Redis is gone, which is said once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError


class RedisOutage:
    """Whether Redis is gone for one repeated piece of work. Logs `lost` when it goes and `back` later."""

    def __init__(self, log: logging.Logger, lost: str, back: str) -> None:
        self._log = log
        self._lost = lost
        self._back = back
        self.ongoing = False

    @contextmanager
    def bridged(self) -> Iterator[None]:
        """Around one try of the work: its failure to reach Redis ends the block, not the caller."""
        try:
            yield
        except (RedisError, OSError) as error:
            if not self.ongoing:
                self._log.warning("%s: %s", self._lost, error)
            self.ongoing = True
        else:
            if self.ongoing:
                self._log.info(self._back)
            self.ongoing = False
