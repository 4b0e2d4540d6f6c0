"""Writes the README's tables of measurements from benchmarks/results/*.json: between <!-- NAME --> and <!-- end -->.

python benchmarks/readme.py           # rewrites README.md
python benchmarks/readme.py --check   # fails where README.md differs from what the results say
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kernels():
    """Times faster than each peer at 1,024 rows of V = 50,259, and the time in copies of the tensor."""
    results = [r for r in read("cpu.json")["results"] if (r["rows"], r["vocab"]) == (1024, 50259)]
    rows = []
    for name in dict.fromkeys(r["op"] for r in results):
        wide, narrow = (
            next(r for r in results if r["op"] == name and r["dtype"] == d) for d in ("float32", "bfloat16")
        )
        row = [f"`{name}`"]
        for r in (wide, narrow):
            peers = r["speedup"]
            second = next((p for p in ("compile", "torch.topk") if p in peers), None)
            row += [f"{peers['eager']:.1f}", "" if second is None else f"{peers[second]:.1f}", f"{r['copies']:.1f}"]
        rows.append(row)
    head = ["1,024 x 50,259", "float32: x eager", "x compile*", "copies", "bfloat16: x eager", "x compile*", "copies"]
    return table(head, rows)


def train_step():
    found = read("cpu_train_step.json")
    rows = []
    for vocab in dict.fromkeys(r["vocab"] for r in found["times"]):
        ms = {r["step"]: r["ms"] for r in found["times"] if r["vocab"] == vocab}
        share = {r["step"]: r["share"] for r in found["memory"] if r["vocab"] == vocab}
        rows.append([f"{vocab:,}", *(f"{ms[s] / ms['integer']:.2f}" for s in ("posterior", "simplex", "eager")),
                     *(f"{max(share[s], 0):.0%}" for s in ("posterior", "simplex"))])  # fmt: skip
    head = ["V", "posterior", "simplex", "eager x_t", "memory: posterior", "simplex"]
    return table(head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = new = path.read_text()
    for name, make in (("kernels", kernels), ("train step", train_step)):
        new, count = re.subn(f"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", new,
                             flags=re.S)  # fmt: skip
        assert count == 1, f"README.md has no <!-- {name} --> ... <!-- end -->"
    if arguments.check:
        sys.exit(
            0 if new == text else "README.md: its tables are not those of benchmarks/results; run benchmarks/readme.py"
        )
    path.write_text(new)


if __name__ == "__main__":
    main()
