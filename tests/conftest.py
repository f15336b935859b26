"""The surroundings of every test.

Each test has folders of its own, none of the user's settings, the default signals, and a check that mlfleet does not
block the event loop. Every teardown is bounded, and no process outlives the session.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

pytest_plugins: list[str] = [
    "components.browser",
    "components.certificates",
    "components.conda",
    "components.docker",
    "components.fake_kubernetes",
    "components.gcs",
    "components.git_http",
    "components.http_files",
    "components.minilake",
    "components.mlflow_server",
    "components.mlflow_store",
    "components.nginx",
    "components.notebook",
    "components.own_engine",
    "components.plugins",
    "components.registry",
    "components.s3",
    "components.slurm",
    "components.ssh_server",
]


_MARK = "TESTS_OF_MLFLEET"
"""The environment variable that every process of a test session inherits; its value tells sessions apart."""

_TEARDOWN_TIMEOUT = 120  # seconds; a few servers may have to be stopped at the end

if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[_MARK] = str(os.getpid())

# Started by `nohup` or as a background job of a shell, we ignore some signals, and all of our children would inherit
# that: no Ctrl-C of a test would end anything. A signal with a handler, however, has its default effect in children.
if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for _number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(_number) == signal.SIG_IGN:
            signal.signal(_number, lambda number, frame: None)

# Components that take seconds to start, or that do seconds of real work: building environments, pulling images.
_SLOW_FIXTURES = {
    "conda_channel",
    "conda_program",
    "databricks",
    "docker_engine",
    "minilake",
    "mlflow_behind_nginx",
    "mlflow_server",
    "mlflow_server_with_auth",
    "mlflow_server_with_prefix",
    "mlflow_server_with_workspaces",
    "new_store",
    "oldest_mlflow_server",
    "own_engine",
    "plugin_folder",
    "python_image",
    "browser",
    "gcs_emulator",
    "registry",
    "registry_with_password",
    "s3_server",
    "shell_image",
    "slurm",
}
_SLOW_PLACES = (
    "backends/databricks/test_databricks_faults.py",
    "backends/kubernetes/test_kubernetes_chaos.py",
    "backends/test_plugins.py",
    "cli/",
    "contract/",
    "engine/test_cancellation.py",
    "environments/test_env_",
    "parity/",
    "project/test_fetch_git.py",
    "sweeps/test_sweep_killed.py",
    "test_asgi.py",
    "test_detached.py",
    "test_docs.py",
    "test_driver_dies.py",
    "test_examples.py",
    "test_notebook.py",
    "test_progress.py",
    "test_services.py",
    "test_sync.py",
    "tracking/test_connections.py",
    "tracking/test_embedded.py",
    "tracking/test_faults.py",
    "tracking/test_servers.py",
)

# Words in the names of test files, and the components that these need and a machine has one of.
_ONE_OF_A_MACHINE = {"databricks": "minilake", "object_stores": "minilake", "docker": "a Docker engine"}


def _scope(nodeid: str) -> str:
    """Return the name of the tests that one worker runs: those of a file, which share servers, or of a component."""
    file = nodeid.partition("::")[0]
    return next((component for word, component in _ONE_OF_A_MACHINE.items() if word in file), file)


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Fail a test in which a call of mlfleet blocks the event loop."""
    with blockbuster_ctx("mlfleet") as checks:
        # The pipe to the guardian holds thousands of its short messages.
        checks.functions["os.write"].can_block_in("mlfleet/_process/guardian.py", "_write")
        for function in checks.functions.values():
            # Runs the coroutines of kubernetes-asyncio, which block in between, on a loop of its own in a thread.
            function.can_block_in("mlfleet/backends/kubernetes/login.py", "_load")
        yield checks


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Restore the logger of mlfleet, which the command line sets up for all of its process."""
    logger = logging.getLogger("mlfleet")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put caches and state into a temporary folder, and hide MLflow and mlfleet settings from outside."""
    home: Path = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "MLFLEET_")) and name != "MLFLEET_REQUIRE_ALL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLEET_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(home / "state"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow tests, by what they need and where they are. Workers begin with the longest scopes.

    Otherwise a long one might begin last, and the other workers would have nothing to do meanwhile. The time limits of
    the slow tests in a scope tell which are long.
    """
    here = Path(__file__).parent
    length: Counter[str] = Counter()
    for item in items:
        place = item.path.relative_to(here).as_posix()
        if place.startswith(_SLOW_PLACES) or not _SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") is not None:
            limit = item.get_closest_marker("timeout")
            length[_scope(item.nodeid)] += limit.args[0] if limit is not None else int(config.getini("timeout"))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -length[_scope(item.nodeid)])


def pytest_collection_finish() -> None:
    """Hide what all tests share from the garbage collector, which tests run to find what was left open."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return two workers for each core, since most tests wait for processes and pauses."""
    return 2 * len(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Fail a teardown that takes too long; pytest-timeout bounds the tests themselves (``timeout_func_only``)."""

    def expire(number: int, frame: FrameType | None) -> NoReturn:
        pytest.fail(f"the teardown of {item.nodeid} took longer than {_TEARDOWN_TIMEOUT} s")

    if threading.current_thread() is not threading.main_thread():
        return (yield)
    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(_TEARDOWN_TIMEOUT)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Kill and name the processes that tests have left behind."""
    if hasattr(config, "workerinput"):
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid == os.getpid() or any("guardian_main" in word for word in process.cmdline()):
                continue  # the guardian ends with this process
            if process.environ().get(_MARK) == os.environ[_MARK]:
                print(f"left behind by a test, and killed now: {process.pid} {process.cmdline()}", file=sys.stderr)
                process.kill()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Keep the tests of a scope together, and the scopes in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):  # type: ignore[misc] # untyped
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False
    return ByScope(config, log)
