"""The steps of the workflow: each logs a file that the next one reads."""

from __future__ import annotations

import argparse
import csv
import io
import math
import random
import statistics
from pathlib import Path

import mlflow

SEED = 11
SLOPE, INTERCEPT, NOISE = 4.0, 1.0, 1.0

Table = list[tuple[float, float]]


def load(rows: int) -> None:
    """Make random data, where a real project would download or query some."""
    source = random.Random(SEED)
    points = [source.uniform(0, 10) for _ in range(rows)]
    table = [(x, INTERCEPT + SLOPE * x + source.gauss(0, NOISE)) for x in points]
    mlflow.log_text(to_csv(table), "data.csv")
    print(f"{rows} rows")


def transform(data: Path) -> None:
    """Scale both columns to mean 0 and deviation 1."""
    xs, ys = zip(*read(data), strict=True)
    scaled = list(zip(scale(xs), scale(ys), strict=True))
    mlflow.log_text(to_csv(scaled), "scaled.csv")
    print(f"{len(scaled)} rows scaled")


def train(data: Path, alpha: float) -> None:
    """Fit a ridge regression with one weight on three quarters of the rows, and measure it on the others."""
    table = read(data)
    split = len(table) * 3 // 4
    fit, held_out = table[:split], table[split:]
    weight = sum(x * y for x, y in fit) / (sum(x * x for x, _ in fit) + alpha * len(fit))
    rmse = math.sqrt(statistics.fmean((y - weight * x) ** 2 for x, y in held_out))
    mlflow.log_metrics({"rmse": rmse, "weight": weight})
    mlflow.log_dict({"weight": weight}, "model.json")
    print(f"alpha={alpha:g} rmse={rmse:.4f}")


def scale(values: tuple[float, ...]) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / deviation for value in values]


def read(path: Path) -> Table:
    with path.open(newline="") as file:
        return [(float(row["x"]), float(row["y"])) for row in csv.DictReader(file)]


def to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["x", "y"])
    writer.writerows(table)
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    loading = steps.add_parser("load")
    loading.add_argument("--rows", type=float, required=True)
    transforming = steps.add_parser("transform")
    transforming.add_argument("--data", type=Path, required=True)
    training = steps.add_parser("train")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--alpha", type=float, required=True)
    arguments = parser.parse_args()
    with mlflow.start_run():
        match arguments.step:
            case "load":
                load(int(arguments.rows))
            case "transform":
                transform(arguments.data)
            case "train":
                train(arguments.data, arguments.alpha)


if __name__ == "__main__":
    main()
