"""Former name of `scripts.launch.job`: jobs that were queued under it unpickle their `scripts.stage.Queued` here."""

from scripts.launch.job import TrainJob as Queued

__all__ = ["Queued"]
