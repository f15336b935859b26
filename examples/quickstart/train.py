"""Fit an elastic net by coordinate descent, in plain Python, and log how it went.

The data are made up, with a fixed seed: the same parameters give the same metrics on every machine.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence

import mlflow

SEED = 7
ROWS = 300
TRUE_WEIGHTS = (3.0, -2.0, 0.0, 0.0, 1.5, 0.0, 0.0, 0.5)
NOISE = 0.5

Rows = list[list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpha", type=float, default=0.5, help="strength of the penalty")
    parser.add_argument("--l1-ratio", type=float, default=0.1, help="0 is ridge, 1 is lasso")
    parser.add_argument("--epochs", type=float, default=20, help="passes over all weights")
    arguments = parser.parse_args()

    features, targets = make_data()
    split = ROWS * 3 // 4
    # In a project's process this is the run that mlfleet has made (MLFLOW_RUN_ID); its parameters are logged already.
    with mlflow.start_run():
        mlflow.log_params({"rows": ROWS, "features": len(TRUE_WEIGHTS), "seed": SEED})
        model = ElasticNet(arguments.alpha, arguments.l1_ratio, len(TRUE_WEIGHTS))
        for epoch in range(int(arguments.epochs)):
            model.improve(features[:split], targets[:split])
            mlflow.log_metric("train_rmse", scores(model, features[:split], targets[:split])["rmse"], step=epoch)
        result = scores(model, features[split:], targets[split:])
        mlflow.log_metrics(result)
        mlflow.log_dict({"intercept": model.intercept, "weights": model.weights}, "model.json")
    print(f"elastic net with alpha={arguments.alpha:g}, l1_ratio={arguments.l1_ratio:g}")
    for name, value in result.items():
        print(f"  {name:<4} {value:.4f}")


class ElasticNet:
    """Least squares with a penalty of ``alpha * (l1_ratio * |w| + (1 - l1_ratio) / 2 * w²)`` on every weight."""

    def __init__(self, alpha: float, l1_ratio: float, size: int) -> None:
        self.l1 = alpha * l1_ratio
        self.l2 = alpha * (1 - l1_ratio)
        self.intercept = 0.0
        self.weights = [0.0] * size

    def predict(self, row: Sequence[float]) -> float:
        return self.intercept + sum(weight * value for weight, value in zip(self.weights, row, strict=True))

    def improve(self, features: Rows, targets: Sequence[float]) -> None:
        """One epoch: the best value of each weight in turn, the others held fast."""
        count = len(targets)
        residuals = [target - self.predict(row) for row, target in zip(features, targets, strict=True)]
        for index, weight in enumerate(self.weights):
            column = [row[index] for row in features]
            square = sum(value * value for value in column) / count
            gain = sum(value * residual for value, residual in zip(column, residuals, strict=True)) / count
            gain += square * weight
            best = math.copysign(max(abs(gain) - self.l1, 0.0), gain) / (square + self.l2)
            residuals = [residual - value * (best - weight) for value, residual in zip(column, residuals, strict=True)]
            self.weights[index] = best
        self.intercept += sum(residuals) / count


def make_data() -> tuple[Rows, list[float]]:
    """Rows of normal features, and targets that depend linearly on some of them."""
    source = random.Random(SEED)
    features = [[source.gauss(0, 1) for _ in TRUE_WEIGHTS] for _ in range(ROWS)]
    targets = [
        2.0 + sum(weight * value for weight, value in zip(TRUE_WEIGHTS, row, strict=True)) + source.gauss(0, NOISE)
        for row in features
    ]
    return features, targets


def scores(model: ElasticNet, features: Rows, targets: Sequence[float]) -> dict[str, float]:
    """Root mean squared error, mean absolute error and R² of the model on these rows."""
    errors = [target - model.predict(row) for row, target in zip(features, targets, strict=True)]
    mean = sum(targets) / len(targets)
    squares = sum(error * error for error in errors)
    return {
        "rmse": math.sqrt(squares / len(errors)),
        "mae": sum(abs(error) for error in errors) / len(errors),
        "r2": 1 - squares / sum((target - mean) ** 2 for target in targets),
    }


if __name__ == "__main__":
    main()
