"""What a device is asked, and when.

A device that has been silent since an interval began is asked for its status in the
second half of that interval. Its id decides the moment, so that many devices are not
asked at once."""

import zlib
from dataclasses import dataclass, field

# Sent to every device, as the first version of this collector did. Real devices answer
# it with 404, and stream all the same.
ENABLE_NOTIFICATIONS = (
    '{"id":1,"src":"collector","method":"NotifyStatus","params":{"enable":true}}'
)
GET_STATUS = '{"id":2,"src":"collector","method":"Shelly.GetStatus"}'
GET_STATUS_ID = b"2"
# Sent to a device that has answered, for the names that its owner gave it.
GET_CONFIG = '{"id":3,"src":"collector","method":"Shelly.GetConfig"}'
GET_CONFIG_ID = b"3"

# The shortest pause between two requests of the same kind, in seconds. An owner seldom
# changes a name.
PAUSES = {GET_STATUS: 60.0, GET_CONFIG: 3600.0}
# Behind a filter, requests are never answered. After this many requests for the status
# in a row without an answer, the pause is longer: ten minutes, less some slack for a
# look that comes early.
MAX_UNANSWERED = 3
UNANSWERED_PAUSE = 590.0


@dataclass(slots=True)
class Requests:
    """What the device on a connection has been asked."""

    # When each request was last sent.
    sent_at: dict[str, float] = field(default_factory=dict)
    # Requests for the status since the last answer.
    unanswered: int = 0
    # The fraction of an interval after which a silent device is asked. It stays 1.0,
    # which is never reached, until a frame tells the device's id.
    ask_after: float = 1.0
    # The start of the interval in which the device was last looked at.
    looked_interval: float = 0.0

    def may_send(self, request: str, now: float) -> bool:
        return not self.was_sent_within(PAUSES[request], request, now)

    def was_sent_within(self, seconds: float, request: str, now: float) -> bool:
        """Whether a request was sent in the last `seconds`.

        If the device does not answer, UNANSWERED_PAUSE counts instead."""
        if request == GET_STATUS and self.unanswered >= MAX_UNANSWERED:
            seconds = UNANSWERED_PAUSE
        age = now - self.sent_at.get(request, 0.0)
        # A negative age means that the clock was set back, so it proves nothing.
        return 0 <= age < seconds

    def note_sent(self, request: str, now: float) -> None:
        self.sent_at[request] = now
        if request == GET_STATUS:
            self.unanswered += 1

    def is_look_due(self, start: float, fraction: float) -> bool:
        """Whether the device is still to be looked at in the interval that began at
        `start`, of which a fraction (0 to 1) has passed."""
        return start != self.looked_interval and fraction >= self.ask_after


def moment_of(device_id: str) -> float:
    """The fraction of an interval after which this device is asked, 0.5 to 0.9: early
    enough for an answer that takes seconds."""
    fraction = zlib.crc32(device_id.encode()) / 2**32
    return 0.5 + 0.4 * fraction
