"""Real processes that train together over gloo, or NCCL on GPUs, and wait in between without taking a core."""

from __future__ import annotations

import argparse
import dataclasses
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
from common.recipe import Recipe
from common.signals import uninterrupted
from scripts import timing
from scripts.options import Mode


class Team:
    """As many processes as there are `members`, each with every mode and with images of its own.

    Args:
        recipe: its name.
        device: "cpu", or "cuda" for a GPU each.
        counted: count what is sent, by a hook that takes time.
    """

    def __init__(self, recipe: str, modes: list[Mode], members: int, device: str, counted: bool = False):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.members: list[Any] = []
        resource_tracker.ensure_running()  # its start would let Ctrl-C through again
        with uninterrupted():  # `end` ends them
            for rank in range(members):
                ours, theirs = context.Pipe()
                words = (theirs, self.folder.name, recipe, modes, rank, members, device, counted)
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
        of its "weights", which had different images and the same gradients; where it is counted, what each "sent" in
        the last turn."""
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


def communication(recipe: Recipe, modes: list[Mode]) -> list[dict[str, int]]:
    """What one of two processes gives DDP to reduce in a step of each mode: "bytes" of gradients, and "all_reduces".

    Counted by a communication hook in two real processes over gloo on the CPU, at a batch of two images.
    """
    small = {"batch_size": 2, "device": "cpu", "amp": "off", "compile": False, "channels_last": False, "threads": 1,
             "steps": 1, "warmup": 1}  # fmt: skip
    modes = [dataclasses.replace(mode, args=argparse.Namespace(**vars(mode.args) | small)) for mode in modes]
    gang = Team(recipe.name, modes, 2, "cpu", counted=True)
    try:
        for place in range(len(modes)):
            gang.turn(place)
        first, _ = gang.facts()["sent"]
    finally:
        gang.end()
    return [{"bytes": sum(b for _, b in sent), "all_reduces": sum(at == 0 for at, _ in sent)} for sent in first]


def _train(
    pipe: Connection, folder: str, recipe: str, modes: list[Mode], rank: int, members: int, kind: str,
    counted: bool,
) -> None:  # fmt: skip
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
        subjects = [timing.warm_subject(RECIPES[recipe], mode, process, args.warmup, counted) for mode in modes]
    pipe.send(None)
    while True:
        try:
            place = pipe.recv()
        except EOFError:  # whoever asked is gone
            return
        if place is None:
            sums = [sum(p.double().sum().item() for p in subject.trainer.bare.parameters()) for subject in subjects]
            facts = {"world_size": torch_dist.get_world_size(), "pids": os.getpid(), "weights": sums}
            pipe.send(facts | ({"sent": [subject.sent for subject in subjects]} if counted else {}))
            continue
        torch_dist.barrier()
        subjects[place].sent.clear()
        subjects[place].round(args.steps)
        pipe.send((subjects[place].rounds[-1], subjects[place].cpu[-1]))
