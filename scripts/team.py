"""Real processes that train together over gloo, or NCCL on GPUs, and wait in between without taking a core."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from common.dist import Process
from common.errors import StopTraining
from common.signals import uninterrupted
from scripts import timing


class Team:
    """As many processes as there are `members`, each with every mode and with images of its own.

    Args:
        recipe: its name.
        device: "cpu", or "cuda" for a GPU each.
    """

    def __init__(self, recipe: str, modes: list[timing.Mode], members: int, device: str):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.members: list[Any] = []
        resource_tracker.ensure_running()  # its start would let Ctrl-C through again
        with uninterrupted():  # `end` ends them
            for rank in range(members):
                ours, theirs = context.Pipe()
                words = (theirs, self.folder.name, recipe, modes, rank, members, device)
                self.members.append(context.Process(target=_train, args=words, daemon=True))
                self.members[-1].start()
                theirs.close()
                self.pipes.append(ours)
        self._hear()

    def turn(self, mode: int) -> tuple[dict[str, float], float]:
        """Steps of a mode in all processes at once → seconds a step by part of the slowest, and the CPU's of all."""
        found = self._ask(mode)
        return max((parts for parts, _ in found), key=lambda parts: sum(parts.values())), sum(cpu for _, cpu in found)

    def facts(self) -> dict[str, Any]:
        """What shows that they trained together: "world_size" as each knows it, its "pids" and, for each mode, the sum
        of its "weights", which had different images and the same gradients."""
        found = self._ask(None)
        return {name: [fact[name] for fact in found] for name in found[0]}

    def end(self) -> None:
        """Ends the processes."""
        for member in self.members:
            member.terminate()
            member.join()
        self.folder.cleanup()

    def _ask(self, what: int | None) -> list[Any]:
        try:
            for pipe in self.pipes:
                pipe.send(what)
        except OSError:
            pass  # whoever is gone is met with in `_hear`
        return self._hear()

    def _hear(self) -> list[Any]:
        said: dict[Any, Any] = {}
        try:
            while len(said) < len(self.pipes):  # not in order, since the others wait for one that is gone
                ready: list[Any] = wait([pipe for pipe in self.pipes if pipe not in said])
                said |= {pipe: pipe.recv() for pipe in ready}
        except (EOFError, OSError) as error:
            self.end()
            raise StopTraining(f"one of {len(self.members)} processes came to its end too early") from error
        return [said[pipe] for pipe in self.pipes]


def _train(
    pipe: Connection, folder: str, recipe: str, modes: list[timing.Mode], rank: int, members: int, kind: str
) -> None:
    from scripts.table import RECIPES

    args = modes[0].args
    torch.set_num_threads(args.threads)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend, at = "nccl" if kind == "cuda" else "gloo", f"file://{folder}/store"
    torch_dist.init_process_group(backend, init_method=at, rank=rank, world_size=members)
    process = Process(device, rank, members, rank)
    with timing.silent():  # DDP warns of a pass in which, after all, no parameter is unused
        subjects = [timing.warm_subject(RECIPES[recipe], mode, process, args.warmup) for mode in modes]
    pipe.send(None)
    while True:
        try:
            place = pipe.recv()
        except EOFError:  # whoever asked is gone
            return
        if place is None:
            sums = [sum(p.double().sum().item() for p in subject.trainer.bare.parameters()) for subject in subjects]
            pipe.send({"world_size": torch_dist.get_world_size(), "pids": os.getpid(), "weights": sums})
            continue
        torch_dist.barrier()
        subjects[place].round(args.steps)
        pipe.send((subjects[place].rounds[-1], subjects[place].cpu[-1]))
