"""A command line with flags, lists and an optional option. It only shows what it was given."""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--layers", type=int, action="append", default=[])
parser.add_argument("--tags", nargs="*")
parser.add_argument("--verbose", action="store_true")
parser.add_argument("--note")
print(vars(parser.parse_args()))
