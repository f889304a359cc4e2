"""Schedules: messages at fixed times, each published once by whichever worker comes first."""

from duly.schedules.broker import Ticking, ticking
from duly.schedules.schedule import Schedule, Timetable
from duly.schedules.scheduler import Scheduler
from duly.schedules.ticks import Cron, Every, Ticks

__all__ = ["Cron", "Every", "Schedule", "Scheduler", "Ticking", "Ticks", "Timetable", "ticking"]
