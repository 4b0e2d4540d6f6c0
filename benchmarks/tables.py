"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results: between <!-- NAME --> and <!-- end -->.

python benchmarks/tables.py           # rewrites both
python benchmarks/tables.py --check   # fails where they differ from what the results say
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
from method.compared import beside, grouped, placed, results, sampled_as, titled

from klflow_ext.files import write_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kernel_rows(rows_of, vocab):
    """Times faster than each peer at so many rows of V, and the time in copies of the tensor."""
    results = [r for r in read("cpu.json")["results"] if (r["rows"], r["vocab"]) == (rows_of, vocab)]
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
    head = [f"{rows_of:,} x {vocab:,}", "float32: x eager", "x compile*", "copies", "bfloat16: x eager", "x compile*", "copies"]  # fmt: skip
    return table(head, rows)


def kernels():
    shapes = dict.fromkeys((r["rows"], r["vocab"]) for r in read("cpu.json")["results"])
    return "\n\n".join(kernel_rows(*shape) for shape in shapes)


STEPS = {"posterior": "posterior input", "simplex": "the paper's input", "eager": "the paper's step in PyTorch"}


def train_step():
    """Time of a step in that of one with integer tokens."""
    rows = []
    found = read("cpu_train_step.json")["times"]
    for vocab in dict.fromkeys(r["vocab"] for r in found):
        ms = {r["step"]: r["ms"] for r in found if r["vocab"] == vocab}
        rows.append([f"{vocab:,}", *(f"{ms[step] / ms['integer']:.2f}" for step in STEPS)])
    return table(["V", *STEPS.values()], rows)


def train_memory():
    """MB at the peak of a step."""
    rows = []
    found = read("cpu_train_step.json")["memory"]
    for vocab in dict.fromkeys(r["vocab"] for r in found):
        some = {r["step"]: r for r in found if r["vocab"] == vocab}
        peaks = (f"{some[step]['peak_bytes'] / 1e6:,.0f}" if step in some else "" for step in (*STEPS, "integer"))
        rows.append([f"{vocab:,}", f"{some['posterior']['gradient_bytes'] / 1e6:,.0f}", *peaks])
    return table(["V", "gradients alone", *STEPS.values(), "integer tokens"], rows)


def serve():
    rows = [
        [f"{r['clients']}", f"{r['requests_per_second']:.1f}", f"{r['tokens_per_second']:.0f}", f"{r['median_seconds']:.2f}",
         f"{r['p99_seconds']:.2f}", f"{r['mean_batch']:.1f}", f"{r['lost']}", f"{r['other_tokens']}"]
        for r in read("cpu_serve.json")["rows"]
    ]  # fmt: skip
    head = ["clients", "requests a second", "tokens a second", "latency, median, s", "99th percentile, s", "ran together", "lost", "with other tokens"]  # fmt: skip
    return table(head, rows)


def distances():
    """Of `klflow eval --mauve` of the model of the package: figure [interval] of held-out text, and of samples by passes."""
    shown = {
        "mauve": "MAUVE",
        "distance": "energy distance",
        "bits_per_byte": "bits per byte",
        "token_entropy": "token entropy",
    }
    found = read("distances.json")
    rows = {row["name"]: row for run in found for row in run["rows"]}  # those of held-out text are the same in all
    cells = [
        [name, *("{mean:.2f} [{low:.2f}, {high:.2f}]".format(**row[field]) for field in shown)]
        for name, row in rows.items()
    ]
    return table([f"{found[0]['samples']} texts of {found[0]['length']} tokens", *shown.values()], cells)


def paper_order():
    """Of the paper's table of passes the column of 32 (left to right: a pass a token), at both sizes, the best first."""
    rows, shown = read("paper/cpu/nfe.json")["rows"], []
    for name in dict.fromkeys(row["key"]["method"] for row in rows if "nfe" in row["key"] and "method" in row["key"]):
        cells = [name]
        for kind in ("method", "earlier"):
            some = [
                row
                for row in rows
                if row["key"].get(kind) == name and row["key"]["nfe"] == (64 if name == "autoregressive" else 32)
            ]
            bits = [np.ravel(row["bits_per_byte"])[0] for row in some]
            entropy = f" ({mean_of([np.ravel(row['entropy'])[0] for row in some])[0]:.2f})" if some else ""
            cells += [cell(bits, 2) + entropy, str(len(some) or "")]
        shown.append(cells)
    head = [
        "bits per byte (entropy), 32 passes",
        "V = 512, 500 steps of 16",
        "seeds",
        "V = 2,048, 1,075 steps of 32",
        "seeds",
    ]
    return table(head, sorted(shown, key=lambda cells: float(cells[1].split()[0])))


def mean_of(values):
    """The mean over seeds, and where there are several the standard deviation."""
    mean = sum(values) / len(values)
    return mean, (statistics.stdev(values) if len(values) > 1 else None)


def cell(values, digits):
    if not values:
        return ""
    mean, spread = mean_of(values)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def tabled(found, name_of=lambda r: r["name"]):
    """[((V, steps), [(name, runs), ...]), ...] in order: a table for each V and number of steps, a row for each name."""
    places = grouped(found, lambda r: beside(r)[:2])
    return [
        (place, sorted(((name, runs) for (name,), runs in grouped(group, lambda r: (name_of(r) + beside(r)[2],)).items()), key=lambda row: placed(row[0])))
        for place, group in sorted(places.items())
    ]  # fmt: skip


def heading(place):
    return f"V = {place[0]:,}, {place[1]:,} steps"


def method_loss():
    """Held-out loss by time of what reads the logit path, mean over seeds."""
    kinds, tables = {"posterior", "simplex", "segments", "slices"}, []
    for place, rows in tabled([r for r in results() if r.get("losses") and r["name"] in kinds]):
        times = list(rows[0][1][0]["losses"])
        cells = []
        for name, runs in rows:
            columns = [[r["losses"][t] for r in runs] for t in times]
            means = [sum(r["losses"].values()) / len(times) for r in runs]
            cells.append([titled(name), str(len(runs)), *(f"{mean_of(c)[0]:.3f}" for c in columns), cell(means, 3)])
        tables.append(table([heading(place), "seeds", *(f"t = {t}" for t in times), "mean"], cells))
    return "\n\n".join(tables)


def sampled():
    """One result for each scheme that a run was sampled by, at top-k 20."""
    found = []
    for r in results():
        rows = [s for s in r.get("samples", []) if s["top_k"] == 20]
        for (name,), some in grouped(rows, lambda s, r=r: (sampled_as(r["name"], s["method"]),)).items():
            found.append({**r, "shown": name, "samples": some})
    return found


def method_samples():
    """Bits per byte (entropy) of samples at top-k 20, mean over seeds: a table for each V and number of steps."""
    columns, tables, text = (8, 16, 32, 64, 256), [], read("method_text.json")
    for place, rows in tabled(sampled(), lambda r: r["shown"]):
        cells = []
        for name, runs in rows:
            cells.append([titled(name), str(len(runs))])
            for nfe in columns:
                some = [s for r in runs for s in r["samples"] if s["steps"] == nfe]
                entropy = f" ({mean_of([s['entropy'] for s in some])[0]:.2f})" if some else ""
                cells[-1].append(cell([s["bits_per_byte"] for s in some], 2) + entropy)
        real = "; real text {bits_per_byte:.2f} ({entropy:.2f})".format(**text[str(place[0])])
        tables.append(table([heading(place) + real, "seeds", *(f"{n} passes" for n in columns)], cells))
    return "\n\n".join(tables)


def method_likelihood():
    """Nats per token of held-out text, mean over seeds: exact by passes, and the path's bound."""
    columns, tables = (4, 8, 16, 32, 64, None), []
    for place, rows in tabled([r for r in results() if "likelihood" in r]):
        cells = []
        for name, runs in rows:
            cells.append([titled(name), str(len(runs))])
            for column in columns:
                found = [row for r in runs for row in r["likelihood"] if row["steps"] == column]
                bound = "<= " if found and not found[0]["exact"] else ""
                cells[-1].append(bound + cell([row["nats"] for row in found], 3))
        head = [heading(place), "seeds", *(f"{n} passes" for n in columns[:-1]), "the path's own"]
        tables.append(table(head, cells))
    return "\n\n".join(tables)


def method_cost():
    """Milliseconds of a sample by passes: a table for each V."""
    columns, tables = (8, 16, 32, 64), []
    for vocab, found in sorted(read("method_cost.json").items(), key=lambda item: int(item[0])):
        cells = []
        for name in dict.fromkeys(r["name"] for r in found["rows"]):
            ms = {r["steps"]: r["ms"] for r in found["rows"] if r["name"] == name}
            cells.append([titled(name), *(f"{ms[n]:.1f}" if n in ms else "" for n in columns)])
        head = f"V = {int(vocab):,}: ms a sample, {found['count']} at once, {found['threads']} threads"
        tables.append(table([head, *(f"{n} passes" for n in columns)], cells))
    return "\n\n".join(tables)


def quality():
    """The README's: what writes how well in how many passes, at V = 2,048 and equal training steps."""
    shown = (
        "autoregressive",
        "slices",
        "slices, half the steps",
        "mask slices",
        "segments",
        "posterior",
        "simplex",
        "mask",
    )
    columns = (8, 16, 32, 64)
    rows = dict(next(rows for place, rows in tabled(sampled(), lambda r: r["shown"]) if place == (2048, 1075)))
    cells = []
    for name in shown:
        cells.append([titled(name), str(len(rows[name]))])
        for nfe in columns:
            some = [s["bits_per_byte"] for r in rows[name] for s in r["samples"] if s["steps"] == nfe]
            cells[-1].append(f"{mean_of(some)[0]:.2f}" if some else "")
    return table(["bits per byte, lower is better", "seeds", *(f"{n} passes" for n in columns)], cells)


TABLES = (
    ("quality", quality),
    ("kernels", kernels),
    ("train step", train_step),
    ("train memory", train_memory),
    ("serve", serve),
    ("distances", distances),
    ("paper order", paper_order),
    ("method loss", method_loss),
    ("method samples", method_samples),
    ("method likelihood", method_likelihood),
    ("method cost", method_cost),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    texts = {path: path.read_text() for path in PAGES}
    new = dict(texts)
    for name, make in TABLES:
        lines, found = f"{make()}\n", 0
        for path in PAGES:
            new[path], count = re.subn(
                f"(<!-- {name} -->\n).*?(<!-- end -->)",
                lambda m, lines=lines: m[1] + lines + m[2],
                new[path],
                flags=re.S,
            )
            found += count
        assert found, f"no page has <!-- {name} --> ... <!-- end -->"
    if arguments.check:
        wrong = [str(path.relative_to(ROOT)) for path in PAGES if new[path] != texts[path]]
        sys.exit(
            f"{', '.join(wrong)}: tables are not those of benchmarks/results; run benchmarks/tables.py" if wrong else 0
        )
    for path, text in new.items():
        write_file(path, lambda file, text=text: file.write_text(text))


if __name__ == "__main__":
    main()
