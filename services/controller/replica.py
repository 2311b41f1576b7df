"""This replica of the controller: whether it leads, and its state."""

import asyncio
import logging
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from helios.errors import HeliosError, UnavailableError
from helios.redis_outage import RedisOutage, reason
from services.controller import state
from services.controller.leader import Leadership, find_leader
from services.controller.settings import ControllerSettings
from services.controller.state import ControllerState

log = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3


class Replica:
    """Leads, or waits while another replica leads. Only the leader changes the state."""

    def __init__(
        self,
        redis: Redis,
        leadership: Leadership,
        settings: ControllerSettings,
        on_lead: Callable[[], None],
    ) -> None:
        """`on_lead` is called whenever this replica begins to lead."""
        self._redis = redis
        self._leadership = leadership
        self._settings = settings
        self._on_lead = on_lead
        self._state = ControllerState(slo=settings.slo)
        # The term of leadership for which the state was loaded.
        self._resumed_term = 0
        self._changing = asyncio.Lock()
        # Messages about current problems, by subject.
        self._problems: dict[str, str] = {}

    @property
    def is_leading(self) -> bool:
        """Whether this replica leads and so decides."""
        return self._leadership.is_held and self._resumed_term == self._leadership.terms

    @property
    def state(self) -> ControllerState:
        """This replica's state. While another replica leads, the state that that one saved last."""
        return self._state

    def problems(self) -> list[str]:
        """Messages that say why this replica does not lead."""
        return list(self._problems.values())

    async def run(self) -> None:
        """Keeps the leader's lock, or tries to get it, until cancelled."""
        outage = RedisOutage(log, "the last plan stays", "Redis takes the leader's lock again")
        while True:
            try:
                await self._campaign()
            except (RedisError, OSError) as error:
                outage.failed(error)
                self._problems["redis"] = f"the last plan stays: {reason(error)}"
            except HeliosError as error:
                if self._problems.get("state") != error.message:
                    log.warning("this controller cannot lead: %s", error.message)
                self._problems["state"] = error.message
            else:
                outage.over()
                self._problems.pop("redis", None)
                self._problems.pop("state", None)
            await asyncio.sleep(self._settings.lease_seconds / _RENEWALS_PER_LEASE)

    async def resign(self) -> None:
        """Call it after `run`. Releases the lock, so that another replica can lead at once."""
        try:
            await self._leadership.resign()
        except (RedisError, OSError) as error:
            log.warning("the leader's lock ends by itself: %s", reason(error))

    async def check_leading(self) -> None:
        """Raises UnavailableError, naming the leader to ask, when this replica does not lead."""
        if self.is_leading:
            return
        try:
            leader = await find_leader(self._redis)
        except (RedisError, OSError) as error:
            raise UnavailableError(f"nothing can be changed: {reason(error)}") from error
        if leader is None or leader.controller_id == self._leadership.controller_id:
            raise UnavailableError("no controller leads at the moment; try again in a few seconds")
        raise UnavailableError(f"this controller stands by; the one at {leader.address} leads, ask it")

    async def change(self, **fields: object) -> None:
        """Saves the state with these fields changed. Then the change is in force.

        Raises UnavailableError when this replica does not lead or Redis refuses, SettingsError when the saved
        state cannot be read. Then nothing has changed.
        """
        # One change at a time, so that none is lost.
        async with self._changing:
            new = self._state.model_copy(update=fields)
            try:
                await state.save(self._leadership, new, self._settings.mode)
            except (RedisError, OSError) as error:
                raise UnavailableError(f"nothing can be changed: {reason(error)}") from error
            self.note(**fields)

    def note(self, **fields: object) -> None:
        """Changes fields of the state in memory. They are saved with the next change."""
        self._state = self._state.model_copy(update=fields)

    async def _campaign(self) -> None:
        if not await self._leadership.campaign():
            await self._stand_by()
        elif not self.is_leading:
            await self._resume()

    async def _stand_by(self) -> None:
        leader = await find_leader(self._redis)
        where = f" at {leader.address}" if leader else ""
        self._problems["leader"] = f"this controller stands by: another one{where} leads"
        self._state = await state.load(self._redis) or self._state

    async def _resume(self) -> None:
        """Continues with the state that the last leader saved."""
        saved = await state.load(self._redis)
        # If Redis is new or has lost its data, this replica's own state is the best one available.
        self._state = saved or self._state
        # The previous leader may have had another mode.
        await state.save(self._leadership, self._state, self._settings.mode)
        self._problems.pop("leader", None)
        self._on_lead()
        self._resumed_term = self._leadership.terms
        log.info("leading with %s", self._state.model_dump_json())
