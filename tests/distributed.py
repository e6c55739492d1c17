"""Run a test's function on several gloo ranks of this machine."""

import contextlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, *args, world_size=2, timeout=120):
    """Call ``function(rank, *args)`` in ``world_size`` spawned processes, the default gloo group initialised.

    ``function`` is a module's, and ``args`` can be pickled. The first rank that raises ends the others and its
    traceback is raised here; so does ``timeout``, in seconds, for ranks that wait for each other for ever.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = mp.start_processes(_run, (function, args, world_size, folder), world_size, join=False)
        deadline = time.monotonic() + timeout
        try:
            while not ranks.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: ranks still run after {timeout} s")
        except mp.ProcessRaisedException:
            raise AssertionError((folder / "failure").read_text()) from None
        finally:
            for process in ranks.processes:
                process.kill()


def _run(rank, function, args, world_size, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory holds NaN, as in conftest.py
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()  # no rank leaves while another still talks to it
    except BaseException:
        with contextlib.suppress(FileExistsError), open(folder / "failure", "x") as file:  # the first, the cause
            file.write(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
    # Past the interpreter's teardown, in which a thread that torch left running now and then aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
