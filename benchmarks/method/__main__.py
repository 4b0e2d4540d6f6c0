"""The method beside its rivals: one backbone, one optimizer, the same text and steps; held-out loss, and samples under a judge.

python benchmarks/method train --name posterior --seed 0      # one run: runs/method/..., results/method/...json
python benchmarks/method judge --name posterior --seed 0      # bits per byte and entropy of its samples, a few minutes
python benchmarks/method likelihood --name slices --seed 0    # nats per token of held-out text, minutes
python benchmarks/method observe --name slices --seed 0       # held-out text through a channel that confuses it, minutes
python benchmarks/method fill --name segments --seed 0        # held-out stories from their beginnings, and with holes
python benchmarks/method grid --name posterior --seed 0       # the times of the sampling scheme by the race bound
python benchmarks/method race --name posterior --seed 0       # the exact reverse process, with a corrector, beside it
python benchmarks/method sweep --name posterior --seed 0      # t_split, time grid, boosts; with --nfe 16 11 minutes
python benchmarks/method text --vocab-size 2048               # bits per byte and entropy of real text, seconds
python benchmarks/method cost --vocab-size 2048               # milliseconds of a sample by each method, minutes
python benchmarks/method plot                                 # results/method_{loss,frontier,likelihood}.png
python benchmarks/method gallery                              # benchmarks/GALLERY.md: uncurated samples

It needs KLFLOW_DATA, a folder with TinyStories text and the stories260K judge. Held-out loss of the paths of one kind
compares at equal times; text compares across all of them.
"""

import argparse
from pathlib import Path

from compared import METHODS, ROOT
from milliseconds import cost
from observe import observe
from pictures import plot
from samples import fill, grid, judge, likelihood, race, sweep, text
from show import gallery
from train import train

ACTIONS = {
    f.__name__: f for f in (train, judge, text, likelihood, observe, fill, grid, race, sweep, cost, plot, gallery)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--name", choices=METHODS, default="posterior")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1075)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=ROOT.parent / "runs" / "method")
    parser.add_argument("--nfe", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--top-k", type=int, nargs="+", default=[50, 20, 10, 5])
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--method", help="another scheme than the path's best")
    parser.add_argument("--bfloat16", action="store_true", help="sample with the network in bfloat16")
    arguments = parser.parse_args()
    ACTIONS[arguments.action](arguments)


if __name__ == "__main__":
    main()
