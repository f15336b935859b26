"""Let Optuna decide the next point of a sweep from what has finished.

The space is an asynchronous generator: the sweep pulls a point only when a run can start, and when every
result so far has been passed to the study.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import optuna

import mlfleet

PROJECT = Path(__file__).parents[1] / "quickstart"


async def search(trials: int, jobs: int, env_manager: str | None) -> optuna.Study:
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=7))
    asked: dict[int, optuna.Trial] = {}

    async def points() -> AsyncIterator[dict[str, float]]:
        for index in range(trials):
            trial = asked[index] = study.ask()
            yield {
                "alpha": trial.suggest_float("alpha", 1e-3, 1.0, log=True),
                "l1_ratio": trial.suggest_float("l1_ratio", 0.0, 1.0),
            }

    async with (
        mlfleet.Fleet() as fleet,
        fleet.sweep(
            PROJECT,
            points(),
            parameters={"epochs": 5},
            max_concurrent=jobs,
            experiment_name="optuna",
            run_name="tpe",
            env_manager=env_manager,
        ) as sweep,
    ):
        async for result in sweep:
            trial = asked.pop(result.index)
            if result.status is mlfleet.RunStatus.FINISHED:
                study.tell(trial, result.metrics["rmse"])
                print(f"{result.index:>3}  alpha={trial.params['alpha']:.4f}  rmse={result.metrics['rmse']:.4f}")
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                print(f"{result.index:>3}  {result.reason}")
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at the same time (default: 2)")
    parser.add_argument("--env-manager", help="environment manager; local is this Python, which then needs mlflow")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = asyncio.run(search(options.trials, options.jobs, options.env_manager))
    print(f"best: rmse={study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    main()
