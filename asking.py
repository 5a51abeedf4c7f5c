"""What a device is asked, and when.

A device that says nothing for an interval is asked for its status in the interval's
second half. Its id decides when, so that many devices are not asked at once."""

import zlib
from dataclasses import dataclass, field

# Sent to every device, as the first collector did. A real one answers this with 404,
# and streams all the same.
ENABLE_NOTIFICATIONS = (
    '{"id":1,"src":"collector","method":"NotifyStatus","params":{"enable":true}}'
)
GET_STATUS = '{"id":2,"src":"collector","method":"Shelly.GetStatus"}'
GET_STATUS_ID = b"2"
# Sent to a device that has answered, for the names that its owner gave it.
GET_CONFIG = '{"id":3,"src":"collector","method":"Shelly.GetConfig"}'
GET_CONFIG_ID = b"3"

# Times are seconds.
# The shortest one between two requests of a kind. The owner seldom changes a name.
PAUSES = {GET_STATUS: 60.0, GET_CONFIG: 3600.0}
# Behind a filter nobody answers. After so many requests in a row without an answer, it
# is ten minutes, less what two looks may come early.
MAX_UNANSWERED = 3
UNANSWERED_PAUSE = 590.0


@dataclass(slots=True)
class Requests:
    """What a connection's device has been asked."""

    # When each request was last sent.
    sent_at: dict[str, float] = field(default_factory=dict)
    # Requests for the status since the last answer.
    unanswered: int = 0
    # The part of an interval after which its device is asked if it is silent; of a
    # device that has said nothing at all, never.
    moment: float = 1.0
    # The start of the interval in which that was last looked at.
    looked_at: float = 0.0

    def may_send(self, request: str, now: float) -> bool:
        return self.was_not_sent(request, PAUSES[request], now)

    def was_not_sent(self, request: str, for_s: float, now: float) -> bool:
        """Whether a request was not sent for so long, or for longer if nobody answers.
        A clock may have stepped back since."""
        if request == GET_STATUS and self.unanswered >= MAX_UNANSWERED:
            for_s = UNANSWERED_PAUSE
        return not 0 <= now - self.sent_at.get(request, 0.0) < for_s

    def note_sent(self, request: str, now: float) -> None:
        self.sent_at[request] = now
        if request == GET_STATUS:
            self.unanswered += 1

    def is_time_to_look(self, begin: float, passed: float) -> bool:
        """Whether it is time to see if the device is silent. It is true once in an
        interval, which began at `begin`, and of which a part has passed."""
        if begin == self.looked_at or passed < self.moment:
            return False
        self.looked_at = begin
        return True


def moment_of(device_id: str) -> float:
    """The part of an interval after which a silent device is asked: in the second half,
    and early enough for an answer that takes seconds."""
    fraction = zlib.crc32(device_id.encode()) / 2**32
    return 0.5 + 0.4 * fraction
