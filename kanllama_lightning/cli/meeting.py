"""Processes that something else has started (torchrun, SLURM) meet before anything is loaded.

All of them come, or the command ends with words; and the first says where the run goes.
"""

import os
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from kanllama_lightning.types import InputError, RunFinished

WAIT = "KANLLAMA_START_TIMEOUT"
"""Environment variable: seconds that processes wait for each other at the start."""
WAIT_SECONDS = 600.0
LOOK_SECONDS = 0.05
SAID = "kanllama_said"


class Started(NamedTuple):
    """This process among those that were started with it."""

    rank: int
    world: int
    address: str
    port: int
    listens: bool
    """Whether it is this process at which the others meet."""


def started_with_others(num_nodes: int) -> Started | None:
    """How this process was started, if something else than Lightning started others with it.

    Args:
        num_nodes: As in `trainer.num_nodes`; on each node a command may be started by hand.

    Raises:
        InputError: It was started in a way in which the processes do not know each other.
    """
    found: Started | None = None
    if TorchElasticEnvironment.detect():
        env = TorchElasticEnvironment()
        listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not env.global_rank()
        found = Started(
            env.global_rank(), env.world_size(), env.main_address, env.main_port, listens
        )
    elif SLURMEnvironment.detect():
        slurm = SLURMEnvironment()
        rank = slurm.global_rank()
        found = Started(rank, slurm.world_size(), slurm.main_address, slurm.main_port, not rank)
    elif num_nodes > 1 and "LOCAL_RANK" not in os.environ:
        missing = [n for n in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise InputError(
                f"trainer.num_nodes={num_nodes}: {', '.join(missing)} missing in the environment; "
                "start with torchrun or srun, or set NODE_RANK (from 0), MASTER_ADDR and "
                "MASTER_PORT (of the first node) on each node"
            )
        node = int(os.environ["NODE_RANK"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        found = Started(node, num_nodes, address, port, not node)
    elif int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" not in os.environ:
        raise InputError(
            "mpirun: the processes it starts do not find each other here; start with torchrun or "
            "srun instead"
        )
    return found if found is not None and found.world > 1 else None


def patience() -> float:
    """Seconds that processes wait for each other.

    Raises:
        InputError: The environment says something else than a number of seconds.
    """
    given = os.environ.get(WAIT, str(WAIT_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise InputError(f"{WAIT}={given!r}: must be a number of seconds (default {WAIT_SECONDS})")
    return seconds


class Meeting:
    """What the processes of a run tell each other at its start.

    Args:
        own: This process.
        seconds: How long it waits for others.

    Raises:
        InputError: There is nobody where they are to meet.
    """

    def __init__(self, own: Started, seconds: float) -> None:
        self.own, self.seconds = own, seconds
        self.where = f"{own.address}:{own.port}"
        try:
            self.store = dist.TCPStore(
                own.address,
                own.port,
                is_master=own.listens,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
            self.store.set(f"kanllama_here_{own.rank}", "")
        except (RuntimeError, ValueError) as e:
            raise InputError(
                f"process {own.rank} of {own.world} found nobody at {self.where} within "
                f"{seconds:g} s ({WAIT}): the first process was not started or ended, or its port "
                "is not open to this machine"
            ) from e

    def tell(self, folder: str) -> None:
        """Of the first process: wait until all are there, then say where the run goes.

        Raises:
            InputError: Some did not come; says which.
        """
        missing, until = set(range(self.own.world)), time.monotonic() + self.seconds
        while missing := {r for r in missing if not self.store.check([f"kanllama_here_{r}"])}:
            if time.monotonic() > until:
                names = ", ".join(str(r) for r in sorted(missing))
                why = (
                    f"of {self.own.world} processes, counted from 0, these did not come to "
                    f"{self.where} within {self.seconds:g} s ({WAIT}): {names}; look into their "
                    "output, and whether each machine started as many as it should"
                )
                self.refuse(InputError(why))
                raise InputError(why)
            time.sleep(LOOK_SECONDS)
        self.store.set(SAID, f"goes {folder}")

    def refuse(self, why: Exception) -> None:
        """Of the first process: say that there will be no run, or that it is finished."""
        kind = "finished" if isinstance(why, RunFinished) else "refused"
        self.store.set(SAID, f"{kind} {why}")

    def hear(self) -> str:
        """Of the others: the folder of the run, once the first has said it.

        Raises:
            InputError: It has said why there is no run, or nothing.
            RunFinished: It has said that nothing is left to do.
        """
        until = time.monotonic() + 2 * self.seconds  # the first waits for others too
        try:
            while not self.store.check([SAID]):
                if time.monotonic() > until:
                    raise InputError(
                        f"process {self.own.rank} of {self.own.world}: the first process said "
                        f"nothing at {self.where} within {2 * self.seconds:g} s; look into its "
                        "output"
                    )
                time.sleep(LOOK_SECONDS)
            kind, _, what = self.store.get(SAID).decode().partition(" ")
        except RuntimeError as e:
            raise InputError(
                f"process {self.own.rank} of {self.own.world}: the first process, at {self.where}, "
                "has ended; look into its output"
            ) from e
        if kind == "goes":
            return what
        if kind == "finished":
            raise RunFinished(what)
        raise InputError(f"the first process has ended: {what}")
