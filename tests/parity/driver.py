"""Runs projects by mlflow or by mlfleet, whichever it is told to; one process for many calls, since importing is slow.

    python driver.py mlflow|mlfleet LOG

Each line of stdin is a call as JSON, and for each a line with what became of it is printed. What the projects print
goes to LOG.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_HEAD = 600
"""Characters of an error that are told."""


def main() -> None:
    module, log = sys.argv[1:]
    # The projects inherit stdin and stdout, which are not theirs to read and write.
    calls, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(log, "ab") as output, open(os.devnull) as nothing:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    if module == "mlflow":
        importlib.import_module("mlflow.projects")
    run = importlib.import_module("mlfleet" if module == "mlfleet" else "mlflow.projects").run
    version = importlib.import_module(module).__version__
    answers.write(json.dumps({"version": version}) + "\n")
    answers.flush()
    before = dict(os.environ)
    for line in calls:
        call = json.loads(line)
        print(f"=== {call['name']}", file=sys.stderr, flush=True)
        try:
            answer = make(run, call)
        finally:
            os.chdir("/")
            os.environ.clear()
            os.environ.update(before)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def make(run: Any, call: dict[str, Any]) -> dict[str, Any]:
    for name, value in call["environ"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None  # TMPDIR may be another one now
    os.chdir(call["cwd"])
    arguments = copy.deepcopy(call["arguments"])
    uri = call["uri"]
    if call["as_paths"]:
        uri = Path(uri)
        if "storage_dir" in arguments:
            arguments["storage_dir"] = Path(arguments["storage_dir"])
    answer: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            if call["parent"] is not None:
                mlflow = importlib.import_module("mlflow")
                stack.enter_context(mlflow.start_run(run_id=call["parent"]))
            handle = run(uri, **arguments)
        answer["run_id"] = handle.run_id
        if call["cancel_after"] is not None:
            answer["first_status"] = str(handle.get_status())
            Path(call["cancel_after"]).read_text()  # a FIFO, into which the project writes when it has begun
            handle.cancel()
        answer["wait"] = handle.wait()
        answer["status"] = str(handle.get_status())
    except (Exception, SystemExit) as error:
        answer["error"] = str(error)[:_HEAD]
        answer["classes"] = [each.__name__ for each in type(error).__mro__]
    answer["backend_config"] = arguments.get("backend_config")
    return answer


if __name__ == "__main__":
    main()
