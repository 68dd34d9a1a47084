"""Worker processes that train together over gloo, or NCCL on GPUs, and sleep while other points are timed."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from common.distributed import Process
from common.errors import StopTraining
from common.signals import defer_sigint
from scripts.bench.args import Mode
from scripts.bench.cases import RoundTime, build_case


class WorkerGroup:
    """Processes that each hold every mode, with their own images. A worker blocks in `recv` between its rounds, so it
    takes no core from what is timed meanwhile; torch's launchers run one function to its end.

    Args:
        recipe: its name.
        device: "cpu", or "cuda" for a GPU each.

    Raises:
        StopTraining: in every method, if a worker exited.
    """

    def __init__(self, recipe: str, modes: list[Mode], size: int, device: str):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.workers: list[Any] = []
        resource_tracker.ensure_running()  # started later, it would unblock SIGINT
        with defer_sigint():  # workers inherit the blocked SIGINT: `terminate` ends them
            for rank in range(size):
                pipe, worker_pipe = context.Pipe()
                args = (worker_pipe, self.folder.name, recipe, modes, rank, size, device)
                self.workers.append(context.Process(target=_run_worker, args=args, daemon=True))
                self.workers[-1].start()
                worker_pipe.close()
                self.pipes.append(pipe)
        self._receive()

    def run_round(self, mode: int) -> RoundTime:
        """Time a round of a mode in all processes at once → the phases of the slowest, and the CPU time of all."""
        times: list[RoundTime] = self._request(mode)
        return RoundTime(max(times, key=lambda time: time.total).phases, sum(time.cpu for time in times))

    def collect_facts(self) -> dict[str, Any]:
        """Collect evidence that the processes train together: "world_size" as each sees it, its "pids" and, for each
        mode, the sum of its "weights", equal after different images and the same gradients."""
        facts = self._request(None)
        return {name: [fact[name] for fact in facts] for name in facts[0]}

    def terminate(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.terminate()
            worker.join()
        self.folder.cleanup()

    def _request(self, mode: int | None) -> list[Any]:
        try:
            for pipe in self.pipes:
                pipe.send(mode)
        except OSError:
            pass  # `_receive` reports the worker that exited
        return self._receive()

    def _receive(self) -> list[Any]:
        answers: dict[Any, Any] = {}
        try:
            while len(answers) < len(self.pipes):  # whichever comes first, since the others wait for a lost worker
                ready: list[Any] = wait([pipe for pipe in self.pipes if pipe not in answers])
                answers |= {pipe: pipe.recv() for pipe in ready}
        except (EOFError, OSError) as error:
            self.terminate()
            raise StopTraining(f"one of {len(self.workers)} worker processes exited; see its error above") from error
        return [answers[pipe] for pipe in self.pipes]


def _run_worker(
    pipe: Connection, folder: str, recipe: str, modes: list[Mode], rank: int, size: int, device_type: str
) -> None:
    from scripts.launch.registry import RECIPES

    args = modes[0].args
    torch.set_num_threads(args.threads)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    torch_dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    process = Process(device, rank, size, rank)
    cases = [build_case(RECIPES[recipe], mode, process, args.warmup) for mode in modes]
    pipe.send(None)
    while True:
        try:
            place = pipe.recv()
        except EOFError:  # the parent exited
            return
        if place is None:
            sums = [sum(p.double().sum().item() for p in case.trainer.raw_model.parameters()) for case in cases]
            pipe.send({"world_size": torch_dist.get_world_size(), "pids": os.getpid(), "weights": sums})
            continue
        torch_dist.barrier()
        pipe.send(cases[place].run_round(args.steps))
