"""An analysis by many processes with Ray, on one machine or on a cluster."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from polyseme.analysis.flow import Prepared
from polyseme.analysis.kinds import Data, Engine, Found, Work
from polyseme.analysis.shards import Merged, ShardReader, fingerprint_of, shard_range
from polyseme.analysis.site_tables import SiteClusters, cluster_site
from polyseme.attribution.masking import ContextImportances, Places, context_importances
from polyseme.capture import Collected
from polyseme.errors import InputError, MissingDependencyError, PolysemeError, RunError
from polyseme.options import AnalysisOptions
from polyseme.sites import Site
from polyseme.store.files import (
    ASIDE,
    encode_json,
    plain_json,
    read_json,
    replace_bytes,
    writing,
)
from polyseme.store.partial import differences
from polyseme.store.shards import Shard

# Shards per worker. With more, less time is spent waiting for the last one to finish, but the text
# before each shard must be tokenized.
_EACH = 4
#: A shard is given up after raising this many times.
ATTEMPTS = 3
# Attempts at a shard whose worker is lost, which need not be the shard's fault.
_LOST = 10
_SHARDS = "shards"
# Contexts that a worker masks at a time: a multiple of those that go through the model together, so
# that they are the same as in one process.
_CONTEXTS = 16
# What a method of a worker does to a range, in an error.
_CALLED = {
    "read": "The shard of inputs",
    "importances": "The token importances of the run's contexts",
}

Parts = dict[int, tuple[int, int]]


class RayEngine(Engine):
    """Workers, each holding the model, read shards, which this process merges.

    A shard whose worker is lost is read again. Finished shards are kept beside the unfinished run,
    so that a resumed analysis reads only the others. Token importances are computed by workers too.
    If the cluster has several machines, each of them then clusters one site at a time, on all its
    cores.

    Parameters
    ----------
    options : AnalysisOptions
        Every worker must have access to whatever the data reads.
    source : Data
        The data with its settings.
    """

    stage = "reading with Ray"

    def __init__(self, options: AnalysisOptions, source: Data) -> None:
        workers, model = options.workers, options.model
        if workers is not None and (isinstance(workers, bool) or workers < 1):
            raise InputError(f"workers is {workers!r}; a whole number of at least 1 is expected.")
        self._ray = _ray()
        self._model, self._source = model, source
        # A worker writes each shard to a new folder of its own, and reports to this process.
        self._payload = replace(options, overwrite=False, resume=False, progress=False)
        self._address, self._workers = options.address, workers
        self._on_gpu = any(tensor.is_cuda for tensor in model.parameters())
        self._prepared: Prepared | None = None
        self._cores: list[int] = []  # of each machine

    def check(self, prepared: Prepared) -> dict[str, Any]:
        """No checks: this process makes the shards."""
        self._prepared = prepared
        return {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Connect to the cluster, or start Ray on this machine."""
        ray = self._ray
        ours = not ray.is_initialized()
        if ours:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                _reach(self._address)
                ray.init(
                    address=self._address or "local",
                    include_dashboard=False if self._address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                raise InputError(
                    f"Cannot connect to Ray at address {self._address!r} ({_in_short(error)}). "
                    "Start it with: ray start --head. Or omit the address to start Ray here."
                ) from error
            finally:
                # Ray sets its own, which would end the process without a chance to resume.
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, on_sigterm or signal.SIG_DFL)
        try:
            nodes = (node for node in ray.nodes() if node["Alive"])
            cores = (int(node["Resources"].get("CPU", 0)) for node in nodes)
            self._cores = [n for n in cores if n]
            if len(self._cores) > 1:
                self.at_a_time = len(self._cores)
            yield
        finally:
            if ours:
                ray.shutdown()

    def read(self, work: Work) -> Found:
        """Have the workers read the unfinished shards; returns all shards, merged."""
        assert self._prepared is not None
        source = self._source
        total = source.count()
        folder = work.writer.state_folder / _SHARDS
        folder.mkdir(exist_ok=True)
        n_workers = self._n_workers()
        parts = _parts(folder, total, source.settings.batch_size, _EACH * n_workers)
        todo = {n: part for n, part in parts.items() if not (folder / str(n)).is_dir()}
        n_read = sum(stop - first for n, (first, stop) in parts.items() if n not in todo)
        task = work.bars.add_task("Reading the data", total=total, completed=n_read)
        n_workers = min(n_workers, len(todo))
        work.say(f"Ray: {len(todo)} shards to read, {n_workers} at a time.")
        arguments = {number: (*part, total) for number, part in todo.items()}
        for number, files in self._on_workers("read", arguments, n_workers):
            _keep(files, folder / str(number))
            first, stop = todo[number]
            work.bars.update(task, advance=stop - first)
        merged = Merged(self._model, source, self._checked(folder, parts))
        merged.check(self._prepared)
        return merged.read(work)

    def cluster(self, collected: Collected, threshold: float, linkage: str) -> SiteClusters:
        """Cluster a site, on another machine if there are several and the model is not needed."""
        if len(self._cores) < 2 or collected.neurons.is_general:
            return super().cluster(collected, threshold, linkage)
        ray, name = self._ray, collected.site.name
        # The site's layer may be on a GPU, which the task does not have.
        arrays = replace(collected, site=cast(Any, None))
        # The task's threads use all cores of a machine. A lost task is restarted.
        task = ray.remote(num_cpus=min(self._cores), max_retries=_LOST)(cluster_site)
        try:
            return cast(SiteClusters, ray.get(task.remote(arrays, threshold, linkage)))
        except ray.exceptions.RayError as error:
            cause = _in_short(getattr(error, "cause", None) or error)
            raise RunError(
                f"Site {name!r} could not be clustered: {cause}. The data read is kept; fix "
                "this, then resume with resume=True (--resume)."
            ) from error

    def _checked(self, folder: Path, parts: Parts) -> list[Shard]:
        """The shards; raises unless their workers had the same model and data as this process."""
        assert self._prepared is not None
        wanted = plain_json("fingerprint", fingerprint_of(self._prepared, self._source))
        shards = [Shard(folder / str(number)) for number in parts]
        for shard in shards:
            shard.check()
            if changed := differences(wanted, shard.fingerprint):
                shutil.rmtree(shard.path)
                raise RunError(
                    f"A worker used a different model or different data: {changed}. Make sure that "
                    "all machines have the same files and versions, then resume with resume=True "
                    "(--resume)."
                )
        return shards

    def importances(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        ids: Any,
        attention: Any,
        places: Sequence[Places],
        *,
        start: int,
        **options: Any,
    ) -> Iterator[ContextImportances]:
        """Have the workers mask the tokens of some contexts each; see `context_importances`."""
        stops = {
            first: min(first + _CONTEXTS, len(ids)) for first in range(start, len(ids), _CONTEXTS)
        }
        given = self._ray.put((ids, attention, places, options))
        arguments = {first: (first, stop, given) for first, stop in stops.items()}
        n_workers = min(self._n_workers(), len(arguments))
        done = dict[int, list[ContextImportances]]()
        for first, steps in self._on_workers("importances", arguments, n_workers):
            done[first] = steps
            # In order, as a resumed analysis goes on from the first context that is not done.
            while start in done:
                yield from done.pop(start)
                start = stops[start]

    def _on_workers(
        self, method: str, arguments: dict[int, Any], n_workers: int
    ) -> Iterator[tuple[int, Any]]:
        """Call a method of workers with each of the arguments, which begin with a range of inputs.

        Yields the key of the arguments and the result, in any order.
        """
        ray = self._ray
        options = {"num_gpus": 1} if self._on_gpu else {"num_cpus": self._cpus_each(n_workers)}
        # Ray restarts a lost worker; its part is reassigned below.
        worker = ray.remote(max_restarts=-1, max_task_retries=0, **options)(_Worker)
        with _pickled_by_value(ray, *vars(self._payload).values()):
            payload = ray.put(self._payload)
        idle = [worker.remote(payload) for _ in range(n_workers)]
        waiting, running = list(arguments), dict[Any, tuple[int, Any]]()
        raised, lost, given_up = Counter[int](), Counter[int](), dict[int, str]()
        try:
            while waiting or running:
                while idle and waiting:
                    number, at = waiting.pop(0), idle.pop()
                    running[getattr(at, method).remote(*arguments[number])] = (number, at)
                (ready,), _ = ray.wait(list(running), num_returns=1)
                number, at = running.pop(ready)
                idle.append(at)
                try:
                    result = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raised[number] += 1
                    cause = _in_short(error.cause)
                except ray.exceptions.RayError as error:
                    lost[number] += 1
                    cause = f"its worker was lost ({_in_short(error)})"
                else:
                    yield number, result
                    continue
                if raised[number] < ATTEMPTS and lost[number] < _LOST:
                    waiting.append(number)
                else:
                    given_up[number] = cause
        finally:
            for actor in [*idle, *(at for _, at in running.values())]:
                ray.kill(actor)
        if given_up:
            number, cause = next(iter(given_up.items()))
            first, stop = arguments[number][:2]
            others = f" ({len(given_up) - 1} more failed too)" if len(given_up) > 1 else ""
            raise RunError(
                f"{_CALLED[method]} {first:,} to {stop:,} failed {raised[number] + lost[number]} "
                f"times: {cause}{others}. What is finished is kept; fix this, then resume with "
                "resume=True (--resume)."
            )

    def _cpus_each(self, n_workers: int) -> int:
        """Cores per worker: a single machine's are divided among workers; otherwise one each."""
        alone = len(self._cores) == 1
        return max(1, self._cores[0] // max(1, n_workers)) if alone else 1

    def _n_workers(self) -> int:
        resource = "GPU" if self._on_gpu else "CPU"
        most = int(self._ray.cluster_resources().get(resource, 0))
        if not most:
            raise InputError(f"Ray has no {resource} for a worker; check with: ray status")
        return min(self._workers or most, most)


class _Worker:
    """Holds the model in its own process, and reads shards."""

    def __init__(self, options: AnalysisOptions) -> None:
        # The reader is created later: an exception here would be lost with the worker.
        self._options = options
        self._reader: ShardReader | None = None

    def _ready(self) -> ShardReader:
        self._reader = self._reader or ShardReader(self._options)
        return self._reader

    def read(self, first: int, stop: int, total: int) -> dict[str, bytes]:
        """The files of a shard."""
        reader = self._ready()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "shard"
            reader.read((first, stop, total), out)
            return {file.name: file.read_bytes() for file in out.iterdir()}

    def importances(self, first: int, stop: int, arguments: Any) -> list[ContextImportances]:
        """Importances of the tokens of contexts ``first`` to ``stop - 1``."""
        ids, attention, places, options = arguments
        model, sites = self._ready().proved()
        return list(
            context_importances(
                model, sites, ids, attention, places, start=first, stop=stop, **options
            )
        )


def _parts(folder: Path, total: int, batch_size: int, n: int) -> Parts:
    """The ranges of the shards, as many as when the analysis began."""
    plan = folder / "plan.json"
    n = int(str(read_json(plan).get("shards", n)))
    replace_bytes(plan, encode_json({"shards": n}))
    ranges = (shard_range(number, n, total, batch_size) for number in range(1, n + 1))
    return {number: part for number, part in enumerate(ranges) if part[0] < part[1]}


def _keep(files: dict[str, bytes], folder: Path) -> None:
    """Write a shard atomically."""
    aside = folder.with_name(folder.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    with writing(folder):
        aside.mkdir()
        for name, content in files.items():
            replace_bytes(aside / Path(name).name, content)
        aside.rename(folder)


def _reach(address: str | None) -> None:
    """Raise if nothing listens at the address: Ray itself would end this process."""
    host, colon, port = (address or "").rpartition("//")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _in_short(error: BaseException) -> str:
    if isinstance(error, PolysemeError):
        return str(error).rstrip(".")  # it becomes part of a sentence
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


@contextmanager
def _pickled_by_value(ray: Any, *objects: Any) -> Iterator[None]:
    """Send the code of the user's own classes, which workers cannot import."""
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    classes = [type(part) for thing in objects for part in _parts_of(thing)]
    own = []
    for name in {kind.__module__ for kind in classes} - {"__main__", "builtins"}:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file and not file.startswith(installed) and not f"{name}.".startswith("polyseme."):
            own.append(module)
    for module in own:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _parts_of(thing: Any) -> Iterable[Any]:
    return thing.modules() if isinstance(thing, nn.Module) else (thing,)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingDependencyError("engine='ray'", "ray", "ray") from error
    return ray
