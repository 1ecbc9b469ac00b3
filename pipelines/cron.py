"""Cron expressions in the dialect of KFP's scheduler (github.com/robfig/cron, version 1).

It has six fields, the first of them seconds. It has no L, W and #, and Sunday is 0 and not 7. No
Python library accepts exactly this dialect. A library that accepts more would let expressions pass
that fail on the cluster.
"""

import datetime
import re
import typing as tp

from saev.errors import ConfigError

_MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()
_DAYS = "SUN MON TUE WED THU FRI SAT".split()
_DESCRIPTORS = {
    "@yearly": "0 0 0 1 1 *", "@annually": "0 0 0 1 1 *", "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0", "@daily": "0 0 0 * * *", "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}  # fmt: skip
_YEARS = 5
"""Years in which a schedule must fire at least once. KFP's scheduler searches as many years."""


class _Field(tp.NamedTuple):
    name: str
    first: int
    last: int
    words: tuple[str, ...] = ()
    """Names of the values. The first one means `first`."""


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, tuple(_MONTHS)),
    _Field("day of week", 0, 6, tuple(_DAYS)),
)


class Cron(tp.NamedTuple):
    """When a schedule fires, in UTC. Made by :func:`parse`."""

    text: str
    """The expression, as it is sent."""
    seconds: frozenset[int]
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday."""
    any_day: bool
    """Whether one of the two fields for days is a star. Then only the other one decides."""

    def next(self, after: datetime.datetime, n: int = 1) -> list[datetime.datetime]:
        """The next firings after a time, in UTC; fewer than ``n`` if five years have no more."""
        times: list[datetime.datetime] = []
        after = after.astimezone(datetime.UTC).replace(microsecond=0)
        day, end = after.date(), after.date() + datetime.timedelta(days=366 * _YEARS)
        while day <= end and len(times) < n:
            if self._is_day(day):
                times += self._times(day, after, n - len(times))
            day += datetime.timedelta(days=1)
        return times

    def _is_day(self, day: datetime.date) -> bool:
        if day.month not in self.months:
            return False
        by_month, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return by_month and by_week if self.any_day else by_month or by_week

    def _times(
        self, day: datetime.date, after: datetime.datetime, n: int
    ) -> list[datetime.datetime]:
        times: list[datetime.datetime] = []
        for hour in sorted(self.hours):
            for minute in sorted(self.minutes):
                for second in sorted(self.seconds):
                    time = datetime.datetime.combine(
                        day, datetime.time(hour, minute, second, tzinfo=datetime.UTC)
                    )
                    if time > after:
                        times.append(time)
                        if len(times) == n:
                            return times
        return times


def parse(text: str) -> Cron:
    """Check an expression. Raises ConfigError that names the wrong field."""
    text = " ".join(text.split())
    expanded = _DESCRIPTORS.get(text.lower(), text)
    words = expanded.split()
    if len(words) == 5:
        raise ConfigError(
            f"CRON={text!r} has 5 fields; Kubeflow wants 6, the first of which is the second, and "
            f"would read these five as seconds, minutes and so on. You probably mean '0 {text}'."
        )
    if len(words) != 6:
        raise ConfigError(
            f"CRON={text!r} has {len(words)} fields, expected 6: second, minute, hour, day of "
            "month, month, day of week, in UTC. '0 0 3 * * *' is 03:00 every day."
        )
    sets = [_field(word, field, text) for word, field in zip(words, _FIELDS, strict=True)]
    stars = [any(part[0] in "*?" for part in word.split(",")) for word in words]
    seconds, minutes, hours, days, months, weekdays = sets
    any_day = stars[3] or stars[5]
    cron = Cron(expanded, seconds, minutes, hours, days, months, weekdays, any_day)
    if not cron.next(datetime.datetime.now(datetime.UTC)):
        raise ConfigError(f"CRON={text!r} never fires: no year has such a day.")
    if len(cron.seconds) > 1:
        raise ConfigError(
            f"CRON={text!r} fires {len(cron.seconds)} times in a minute; the first field is the "
            f"second. You probably mean '0 {' '.join(words[1:])}'."
        )
    return cron


def _field(word: str, field: _Field, text: str) -> frozenset[int]:
    return frozenset().union(*(_range(part, field, text) for part in word.split(",")))


def _range(part: str, field: _Field, text: str) -> frozenset[int]:
    """`*`, `5`, `1-5`, `*/15`, `10-40/15`, `MON-FRI`."""

    def wrong(why: str) -> ConfigError:
        return ConfigError(
            f"CRON={text!r}: the {field.name} {part!r} {why}. Expected {field.first} to "
            f"{field.last}{', or ' + ' '.join(field.words) if field.words else ''}, "
            "and *, lists (1,2), ranges (1-5) and steps (*/15)."
        )

    found = re.fullmatch(r"([^-/]+)(?:-([^-/]+))?(?:/(\d+))?", part)
    if not found:
        raise wrong("cannot be read")
    low, high, step = found.groups()
    if low in ("*", "?"):
        if high:
            raise wrong("cannot be read")
        start, end = field.first, field.last
    else:
        start = _number(low, field, wrong)
        end = _number(high, field, wrong) if high else (field.last if step else start)
    if start > end:
        raise wrong("begins after its end")
    if step is not None and int(step) == 0:
        raise wrong("has steps of 0")
    return frozenset(range(start, end + 1, int(step or 1)))


def _number(text: str, field: _Field, wrong: tp.Callable[[str], ConfigError]) -> int:
    if text.upper() in field.words:
        return field.first + field.words.index(text.upper())
    if not text.isdigit():
        raise wrong("is not a number")
    if not field.first <= int(text) <= field.last:
        if field.name == "day of week" and int(text) == 7:
            raise wrong("is not a day: Sunday is 0")
        raise wrong("is out of range")
    return int(text)
