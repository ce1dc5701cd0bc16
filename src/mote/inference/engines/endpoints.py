"""Load balancing over servers: a request goes to the least busy one that responds."""

import asyncio
import random
import sys
from collections.abc import Collection, Sequence

FIRST_WAIT = 0.5  # seconds
LONGEST_WAIT = 30.0  # seconds
LOADING_WAIT = 2.0  # seconds between requests to a server that still loads its model
_STRIKES = 3  # consecutive failures that set an endpoint aside: a single one may be the request's fault
_POLL = 0.05  # seconds between checks for a free endpoint


def backoff(failures: int) -> float:
    """Seconds to wait after this many failures: exponential, with jitter so that requests do not return together."""
    return min(FIRST_WAIT * 2.0**failures, LONGEST_WAIT) * random.uniform(0.5, 1.0)


class Endpoint:
    """One address.

    Attributes:
        address: The server's /v1 address.
        in_flight: Number of its requests in flight.
        strikes: Failures since its last response; requests that began before it was set aside do not count.
        set_aside_at: Loop time, in seconds, at which it was last set aside.
        rests_until: Loop time from which it may be used again.
        loading: Whether its last response was that it still loads its model.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.in_flight = 0
        self.strikes = 0
        self.set_aside_at = 0.0
        self.rests_until = 0.0
        self.loading = False

    def is_free(self, now: float) -> bool:
        """Whether it may be used; an endpoint that was set aside is tried with one request at a time."""
        return now >= self.rests_until and (self.strikes < _STRIKES or not self.in_flight)


class Endpoints:
    """The addresses of one engine.

    Args:
        addresses: One or more.
        retries: How often an endpoint that was set aside is tried again before it counts as dead. A dead one is still
            tried now and then while another one responds.
    """

    def __init__(self, addresses: Sequence[str], retries: int) -> None:
        self.all = [Endpoint(address) for address in addresses]
        self.last_reason = ""
        self._dead_from = _STRIKES + retries
        self._turn = asyncio.Lock()

    def __str__(self) -> str:
        return " and ".join(endpoint.address for endpoint in self.all)

    async def take(self, failed: Collection[Endpoint]) -> Endpoint | None:
        """The least busy endpoint, as soon as one is free; None if all are dead. Pair with `give_back`.

        Args:
            failed: Endpoints at which this request has failed; used only if no other one is free.
        """
        clock = asyncio.get_running_loop().time
        async with self._turn:  # one request polls, the others queue behind it
            while any(endpoint.strikes < self._dead_from for endpoint in self.all):
                if free := [endpoint for endpoint in self.all if endpoint.is_free(clock())]:
                    endpoint = min(free, key=lambda endpoint: (endpoint in failed, endpoint.in_flight))
                    endpoint.in_flight += 1
                    return endpoint
                await asyncio.sleep(_POLL)
            return None

    def give_back(self, endpoint: Endpoint) -> None:
        """Count a request on it as finished."""
        endpoint.in_flight -= 1

    def answered(self, endpoint: Endpoint) -> None:
        """Record a response."""
        if endpoint.strikes >= _STRIKES:
            print(f"engine: {endpoint.address} answers again", file=sys.stderr)
        if endpoint.loading:
            print(f"engine: {endpoint.address} has loaded its model", file=sys.stderr)
        endpoint.strikes = 0
        endpoint.loading = False

    def failed(self, endpoint: Endpoint, began: float, reason: str) -> None:
        """Record a failed request that began at `began`; the third consecutive failure sets the endpoint aside."""
        if began < endpoint.set_aside_at:
            return
        endpoint.strikes += 1
        self.last_reason = reason
        if endpoint.strikes < _STRIKES:
            return
        if endpoint.strikes == _STRIKES:
            print(f"engine: {endpoint.address} is set aside ({reason}) and tried again later", file=sys.stderr)
        endpoint.set_aside_at = asyncio.get_running_loop().time()
        endpoint.rests_until = endpoint.set_aside_at + backoff(endpoint.strikes - _STRIKES)

    def loading(self, endpoint: Endpoint, reason: str) -> None:
        """Record that the endpoint is up and still loads its model."""
        if not endpoint.loading:
            print(f"engine: {endpoint.address} still loads its model ({reason}); waiting for it", file=sys.stderr)
        endpoint.strikes = 0
        endpoint.loading = True

    def busy(self, endpoint: Endpoint, seconds: float) -> None:
        """Pause it for as long as it asked."""
        endpoint.rests_until = max(endpoint.rests_until, asyncio.get_running_loop().time() + seconds)
