"""Writes the README's tables of measurements from benchmarks/results/*.json: between <!-- NAME --> and <!-- end -->.

python benchmarks/tables.py           # rewrites README.md
python benchmarks/tables.py --check   # fails where README.md differs from what the results say
"""

import argparse
import json
import re
import sys
from pathlib import Path

from method.compared import grouped, results, sampled_as

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


def method_runs():
    """(result, ...) of benchmarks/method, by (V, steps, name)."""
    return grouped(results(), lambda r: (r["vocab_size"], r["steps"], r["name"]))


def method_loss():
    """Held-out loss by time of what reads the logit path, mean over seeds."""
    tables = []
    groups = {
        key: runs for key, runs in method_runs().items() if {"posterior", "simplex", "segments"} & set(key[2].split())
    }
    for vocab, steps in sorted({key[:2] for key in groups}):
        rows = []
        for (v, s, name), runs in groups.items():
            runs = [r["losses"] for r in runs if "losses" in r]
            if (v, s) == (vocab, steps) and runs:
                times = list(runs[0])
                means = [sum(r[t] for r in runs) / len(runs) for t in times]
                rows.append((sum(means) / len(means), [name, str(len(runs)), *(f"{m:.3f}" for m in means)]))
        cells = [[*row, f"{mean:.3f}"] for mean, row in sorted(rows)]
        tables.append(table([f"V = {vocab:,}, {steps:,} steps", "seeds", *(f"t = {t}" for t in times), "mean"], cells))
    return "\n\n".join(tables)


def method_samples():
    """Bits per byte (entropy) of samples at top-k 20, mean over seeds: a table for each V and number of steps."""
    columns = (8, 16, 32, 64, 256)
    groups: dict[tuple, dict] = {}
    for (vocab, steps, name), runs in method_runs().items():
        for s in (s for r in runs for s in r.get("samples", []) if s["top_k"] == 20):
            groups.setdefault((vocab, steps), {}).setdefault(sampled_as(name, s["method"]), []).append(s)
    tables = []
    for (vocab, steps), rows in sorted(groups.items()):
        cells = []
        for name, samples in sorted(rows.items()):
            cells.append([name])
            for nfe in columns:
                found = [s for s in samples if s["steps"] == nfe]
                means = [sum(s[k] for s in found) / len(found) for k in ("bits_per_byte", "entropy")] if found else []
                cells[-1].append("{:.2f} ({:.2f})".format(*means) if found else "")
        tables.append(table([f"V = {vocab:,}, {steps:,} steps", *(f"NFE {n}" for n in columns)], cells))
    return "\n\n".join(tables)


def method_likelihood():
    """Nats per token of held-out text, mean over seeds: exact by passes, and the path's bound."""
    columns = (4, 8, 16, 32, 64, None)
    tables = []
    for (vocab, steps), group in sorted(grouped(results(), lambda r: (r["vocab_size"], r["steps"])).items()):
        cells = []
        for (name,), runs in sorted(grouped(group, lambda r: (r["name"],)).items()):
            runs = [{row["steps"]: row for row in r["likelihood"]} for r in runs if "likelihood" in r]
            if not runs:
                continue
            cells.append([name, str(len(runs))])
            for column in columns:
                found = [r[column] for r in runs if column in r]
                mean = f"{sum(row['nats'] for row in found) / len(found):.3f}" if found else ""
                cells[-1].append(mean if not found or found[0]["exact"] else f"<= {mean}")
        if cells:
            head = [
                f"V = {vocab:,}, {steps:,} steps",
                "seeds",
                *(f"{n} passes" for n in columns[:-1]),
                "the path's own",
            ]
            tables.append(table(head, cells))
    return "\n\n".join(tables)


TABLES = (
    ("kernels", kernels),
    ("train step", train_step),
    ("method loss", method_loss),
    ("method samples", method_samples),
    ("method likelihood", method_likelihood),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = new = path.read_text()
    for name, make in TABLES:
        new, count = re.subn(f"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", new,
                             flags=re.S)  # fmt: skip
        assert count == 1, f"README.md has no <!-- {name} --> ... <!-- end -->"
    if arguments.check:
        sys.exit(
            0 if new == text else "README.md: its tables are not those of benchmarks/results; run benchmarks/tables.py"
        )
    path.write_text(new)


if __name__ == "__main__":
    main()
