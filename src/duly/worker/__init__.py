"""The worker: lanes, the three ways to run, and the process that drives them."""

from duly.worker.concurrent import ConcurrentLane
from duly.worker.lane import Lane
from duly.worker.process import Worker
from duly.worker.steps import Counts, Surroundings

__all__ = ["ConcurrentLane", "Counts", "Lane", "Surroundings", "Worker"]
