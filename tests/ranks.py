"""Processes that tests run functions in: four ranks over gloo, or one for each GPU over NCCL, started once.

A test hands over a function of its module. The last ranks call it with the mesh of the size that the test asks for, of
one dimension, so that places in a mesh of some ranks are others than those in the world. What the ranks return comes
back; an exception on any of them fails the test with its text; ranks that hang are shown with their stacks.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

SECONDS = 240  # that a function may take before it counts as hung
HERE = str(Path(__file__).parent)


class RankError(AssertionError):
    """Something went wrong on a rank."""


class Ranks:
    """The processes; started by the first function that is handed over, and anew after an error.

    Args:
        size: How many; a power of two.
        device_type: ``"cpu"``, or ``"cuda"`` for a GPU each.
    """

    def __init__(self, size: int = 4, device_type: str = "cpu") -> None:
        self.size, self.device_type = size, device_type
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, everywhere: bool = False) -> list[Any]:
        """Calls ``function(mesh, *arguments)`` on the ranks of a mesh of some of them, a power of two.

        The function uses no groups but those of its mesh, as other ranks wait. With ``everywhere`` all meshes of that
        size call it at once, each rank its own.

        Returns:
            What each rank of the mesh returned.

        Raises:
            RankError: With the traceback of every rank that raised, or the stacks of all if one hangs.
        """
        if not self._processes:
            self._start()
        first = 0 if everywhere else self.size - size
        asked = self._pipes[first:]
        for pipe in asked:
            pipe.send((size, function.__module__, function.__qualname__, arguments))
        answers: dict[int, Any] = {}
        pending = dict(zip(asked, range(first, self.size)))
        while pending:
            ready = wait(list(pending), SECONDS)
            if not ready:
                raise RankError(f"ranks {sorted(pending.values())} hang:\n{self._stacks()}")
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[index]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, "the process is gone")
        failed = [f"rank {rank}:\n{text}" for rank, (is_well, text) in sorted(answers.items()) if not is_well]
        if failed:
            self.stop()  # their collectives may be out of step
            raise RankError("\n".join(failed))
        return [answers[rank][1] for rank in range(self.size - size, self.size)]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        # One process imports what takes seconds to import, and is then copied.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "mixed_attention.distributed", "pytest"])
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")}
        os.environ.update(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")  # read when the children import torch
        try:
            for rank in range(self.size):
                pipe, theirs = context.Pipe()
                arguments = rank, self.size, self.device_type, self._folder.name, theirs, sys.path
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(pipe)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _stacks(self) -> str:
        """Where every rank is, by the stacks of its threads; ends the ranks."""
        assert self._folder is not None
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        for process in self._processes:
            process.join(1)
        folder = Path(self._folder.name)
        text = "\n".join(f"rank {rank}:\n{(folder / f'stacks{rank}').read_text()}" for rank in range(self.size))
        self.stop()
        return text

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()


def _serve(rank: int, world: int, device_type: str, folder: str, pipe: Connection, path: list[str]) -> None:
    """What a process does: call functions until nobody wants any more."""
    import importlib

    sys.path[:] = path
    with open(Path(folder) / f"stacks{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        meshes = _meshes(rank, world, device_type, folder)
        while True:
            try:
                size, module, name, arguments = pipe.recv()
            except EOFError:
                break
            try:
                function = importlib.import_module(module)
                for part in name.split("."):
                    function = getattr(function, part)
                torch.manual_seed(0)
                answer = True, function(meshes[size], *arguments)
            except BaseException:
                answer = False, traceback.format_exc()
            pipe.send(answer)
    os._exit(0)  # without waiting for the others, some of which may be gone


def _meshes(rank: int, world: int, device_type: str, folder: str) -> dict[int, Any]:
    """Meshes of each size, this rank's of several."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(Path(folder) / "store"), world)
    how: dict[str, Any] = {"backend": "gloo"}
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        how = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", rank)}
    patience = datetime.timedelta(seconds=SECONDS - 10)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=patience, **how)
    meshes, size = {}, world
    while size:
        grid = init_device_mesh(device_type, (world // size, size), mesh_dim_names=("outer", "inner"))
        meshes[size] = grid["inner"]
        size //= 2
    return meshes
