"""Load, transform, then train with several penalties at once; each step is an own run below this one."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import mlflow

import mlfleet

PROJECT = Path(__file__).parent


async def workflow(rows: float, alphas: list[float]) -> None:
    # The active run of mlflow becomes the parent of every run that mlfleet makes inside this block.
    with mlflow.start_run():
        loaded = await mlfleet.run_async(PROJECT, "load", parameters={"rows": rows}, env_manager="local")
        print(f"loaded       {loaded.run_id}")

        # The output of one step is the input of the next: mlfleet downloads `path` parameters.
        raw = f"runs:/{loaded.run_id}/data.csv"
        transformed = await mlfleet.run_async(PROJECT, "transform", parameters={"data": raw}, env_manager="local")
        print(f"transformed  {transformed.run_id}")

        scaled = f"runs:/{transformed.run_id}/scaled.csv"
        async with mlfleet.Fleet() as fleet:
            trained = {
                alpha: await fleet.submit(
                    PROJECT,
                    "train",
                    parameters={"data": scaled, "alpha": alpha},
                    run_name=f"train alpha={alpha:g}",
                    env_manager="local",
                )
                for alpha in alphas
            }
            await asyncio.gather(*(run.check() for run in trained.values()))

        errors = {alpha: mlflow.get_run(run.run_id).data.metrics["rmse"] for alpha, run in trained.items()}
        for alpha, rmse in errors.items():
            print(f"trained      {trained[alpha].run_id}  alpha={alpha:g}  rmse={rmse:.4f}")
        best = min(errors, key=lambda alpha: errors[alpha])
        mlflow.log_metrics({"best_alpha": best, "best_rmse": errors[best]})
        print(f"the best is alpha={best:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, default=200)
    parser.add_argument("--alphas", default="0.01,0.1,1", help="penalties, separated by commas (default: 0.01,0.1,1)")
    arguments = parser.parse_args()
    asyncio.run(workflow(arguments.rows, [float(alpha) for alpha in arguments.alphas.split(",")]))


if __name__ == "__main__":
    main()
