"""Instructions per element of the CUDA kernels, counted in what the compiler made of them. Nothing is run, nothing is timed.

Needed are nvcc and, of the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, the disassembler.

A pass is an innermost loop over a row. Of the ways through it, the interior path is counted: the one with the most 128-bit
memory accesses, of these the most special functions (in fours), of these the fewest instructions; so the ends of a row, the
token's column and a new maximum, which few vectors meet, are left out. Where a pass was compiled more than once (a loop for each alignment of a row), the dearest counts.

The share of the bound is predicted by rates for a clock and multiprocessor: 4 warp instructions issued, 16 special
functions, 32 wide multiplies (an assumption), and the bandwidth of GPUS. An element takes the largest of these four, each
summed over the passes; the bound is the larger of memory and special functions. Left out: latency, stalls, and what a row
costs beside its passes. So it is a limit that the instruction count sets, not a forecast.

python benchmarks/sass.py                # the table
python benchmarks/sass.py --json FILE    # and the figures
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter, namedtuple
from pathlib import Path

from klflow_ext.files import write_file

ROOT = Path(__file__).resolve().parent.parent
ARCH = "sm_90"
GPUS = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second of a copy
PROCESSORS, CLOCK = 132, 1.98e9
ISSUE, SPECIAL, WIDE = 128, 16, 32  # instructions of threads a clock and multiprocessor
ACCESSES = ("LDG.128", "STG.128", "LDS.128", "STS.128", "LD.128")
TYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}

# The loop of a pass has all of `has`, and its interior path nothing of `lacks`; an element is one of the instructions `each`
# or, of 128-bit accesses, its share of the 16 bytes (size: bytes of an element there, None: of the kernel's dtype).
Pass = namedtuple("Pass", "name has lacks each size", defaults=(None,))
# Kernels whose mangled name matches: its group is the dtype. moved: bytes of global memory for an element of n bytes.
Kernel = namedtuple("Kernel", "name unit pattern passes moved")
SUM = Pass("sum", {"LDG.128"}, {"STG.128"}, "MUFU.EX2")
GRADIENT = Pass("gradient", {"STG.128", "LDS.128"}, {"LD.128"}, "MUFU.EX2")  # of a row that lies as the logits do
NOISE = Pass("noise", {"MUFU.LG2", "STS.128"}, {"STG", "STG.128"}, "MUFU.EX2")
STORE = Pass("store", {"STG.128", "LDS.128"}, {"MUFU.LG2"}, "STG.128")
NAME = r"%s_kernelI(f|13__nv_bfloat16|6__half)%s"
KERNELS = [
    Kernel("cross_entropy", "cross_entropy", NAME % ("cross_entropy", "Lb1E"), [SUM], lambda n: n),
    Kernel("cross_entropy + gradient", "cross_entropy", NAME % ("cross_entropy", "Lb1E"), [SUM, GRADIENT], lambda n: 2 * n),
    Kernel("noise_interpolate", "noise_interpolate", NAME % ("noise_interpolate", "Lb0E"), [NOISE, STORE], lambda n: n),
    Kernel("noise_interpolate, log", "noise_interpolate", NAME % ("noise_interpolate", "Lb1E"), [NOISE, STORE], lambda n: n),
    Kernel("topk_sample", "topk_sample", NAME % ("topk_sample", "EEv"), [
        Pass("read", {"LDG.128"}, {"MUFU.EX2", "STG.128"}, "STS.128"),
    ], lambda n: n),
    Kernel("posterior", "posterior", "posterior_kernelILb0ENS0_11NoiseSourceE", [
        Pass("noise", {"STS.128"}, {}, "MUFU.LG2"),
        Pass("evidence", {"LDG.128", "STS.128"}, {"MUFU.EX2"}, "STS.128", 4),
        Pass("queue", {"LDS.128", "FMNMX"}, {"LDG.128", "STS.128", "STS", "MUFU.EX2", "MUFU.LG2"}, "LDS.128", 4),
        Pass("weigh", {"LDS.128"}, {"STG"}, "MUFU.EX2"),
        Pass("place", {"LDS.128", "STG"}, {"MUFU.LG2", "STG"}, "LDS.128", 4),
    ], lambda n: 0),
]  # fmt: skip


def tools():
    """(nvcc, folder of cuobjdump and nvdisasm), None for what is missing."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
    found = shutil.which("cuobjdump")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin"))
    return nvcc, next((f for f in folders if (f / "cuobjdump").is_file() and (f / "nvdisasm").is_file()), None)


def disassemble(unit, nvcc, folder):
    """{mangled name: lines of SASS} of csrc/cuda/<unit>.cu."""
    with tempfile.TemporaryDirectory() as scratch:
        cubin = f"{scratch}/{unit}.cubin"
        flags = ["-std=c++17", "-O3", f"-arch={ARCH}", "-cubin", '-DKLFLOW_CUDA_ARCHES=""', f"-I{ROOT / 'csrc'}"]
        subprocess.run([nvcc, *flags, str(ROOT / "csrc" / "cuda" / f"{unit}.cu"), "-o", cubin], check=True)
        env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        text = subprocess.run(
            [f"{folder}/cuobjdump", "-sass", cubin], env=env, capture_output=True, text=True, check=True
        )
    functions = re.split(r"Function : (\w+)", text.stdout)
    return {name: body.splitlines() for name, body in zip(functions[1::2], functions[2::2], strict=True)}


Instruction = namedtuple("Instruction", "address name target conditional ends")


def parse(lines):
    """The instructions of a function. name: its first part and, of those that are told apart, another (LDG.128)."""
    found = []
    for line in lines:
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?);", line)
        if match is None:
            continue
        address, predicate, opcode, operands = match.groups()
        first, *rest = opcode.split(".")
        kinds = [kind for kind in rest if kind in ("128", "EX2", "LG2", "WIDE")]
        branch = first == "BRA" and re.search(r"(.*?)(?:`\(\S*\)|0x([0-9a-f]+))\s*$", operands)
        conditional = predicate is not None or bool(branch and branch[1].strip())
        found.append(
            Instruction(
                int(address, 16),
                ".".join([first, *kinds[:1]]),
                int(branch[2], 16) if branch else None,
                conditional,
                first in ("BRA", "EXIT", "RET", "BRX", "CALL") and (first == "BRA" or not conditional),
            )
        )
    return found


def loops_of(instructions):
    """For each loop that holds 128-bit accesses and no other such loop: Counters of the names on the shortest ways through it."""
    starts = {instructions[0].address} | {i.target for i in instructions if i.target is not None}
    starts |= {
        b.address for a, b in zip(instructions, instructions[1:], strict=False) if a.target is not None or a.ends
    }
    blocks, order = {}, []
    for instruction in instructions:
        if instruction.address in starts:
            order.append(instruction.address)
            blocks[instruction.address] = []
        blocks[order[-1]].append(instruction)
    following = dict(zip(order, order[1:], strict=False))
    after = {}
    for start, block in blocks.items():
        last = block[-1]
        after[start] = [last.target] if last.target in blocks else []
        if start in following and (last.conditional or not last.ends):
            after[start].append(following[start])
    before = {start: [s for s in blocks if start in after[s]] for start in blocks}
    loops: dict[int, set] = {}
    for latch in blocks:
        for header in (h for h in after[latch] if h <= latch):
            body = loops.setdefault(header, {header})
            waiting = [latch]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block]

    def weigh(start):
        names = [i.name for i in blocks[start]]
        return [names.count(name) for name in ACCESSES] + [sum(n.startswith("MUFU") for n in names)]

    loops = {header: body for header, body in loops.items() if any(sum(weigh(s)[:-1]) for s in body)}
    inner = {h: body for h, body in loops.items() if not any(o != h and o in body for o in loops)}

    def ways_through(header, body):
        ways = {}  # from a block to the end of an iteration: {what `weigh` counts: (instructions, blocks)}

        def walk(start):
            if start not in ways:
                ways[start] = {}  # an edge back to it, within an inner loop, is no way on
                on = [((0,) * len(weigh(start)), (0, ()))] if header in after[start] else []
                on += [way for s in after[start] if s in body and s != header for way in walk(s).items()]
                for counts, (instructions, path) in on:
                    way = (instructions + len(blocks[start]), (start, *path))
                    key = tuple(a + b for a, b in zip(counts, weigh(start), strict=True))
                    ways[start][key] = min(way, ways[start].get(key, way))
            return ways[start]

        return [Counter(i.name for b in path for i in blocks[b]) for _, path in walk(header).values()]

    return [ways_through(header, body) for header, body in inner.items()]


def total(loop, pattern):
    return sum(n for name, n in loop.items() if re.match(pattern, name))


def interior(ways, step):
    """Of the ways through a loop, the one of this pass that counts; None: the loop is of another pass."""

    def order(way):
        special = total(way, "MUFU") // 4 if step.each == "MUFU.EX2" else 0
        return total(way, r".*\.128$"), special, -way.total()

    if not all(any(way[n] for way in ways) for n in step.has):
        return None
    ways = [way for way in ways if way[step.each] and not any(way[n] for n in step.lacks)]
    return max(ways, key=order, default=None)


def count(loops, step, size):
    """What the dearest loop of a pass costs an element: {instructions, special, wide, global, shared}."""
    found = []
    for way in filter(None, (interior(ways, step) for ways in loops)):
        elements = way[step.each] // 4 * 4  # special functions: a new maximum has one more
        if step.each.endswith(".128"):
            elements = way[step.each] * 16 // (step.size or size)
        moved, shared = total(way, r"(LDG|STG)\b"), total(way, r"(LDS|STS|LD)\b")
        found.append((elements, way.total(), total(way, "MUFU"), way["IMAD.WIDE"], moved, shared))
    if not found:
        return None
    most = max(f[0] for f in found)  # the unrolled loop, not what is left over at its end
    dearest = max(f for f in found if f[0] == most)
    names = ("instructions", "special", "wide_multiplies", "global", "shared")
    return {"elements": most, **{name: n / most for name, n in zip(names, dearest[1:], strict=True)}}


def share(passes, moved):
    """Predicted share of the bound for each of GPUS."""
    sums = {name: sum(p[name] for p in passes) for name in ("instructions", "special", "wide_multiplies")}
    special = sums["special"] / SPECIAL
    shares = {}
    for gpu, bandwidth in GPUS.items():
        bound = max(moved / (bandwidth / PROCESSORS / CLOCK), special)
        taken = max(bound, sums["instructions"] / ISSUE, sums["wide_multiplies"] / WIDE)
        shares[gpu] = bound / taken
    return shares


def measure(kernels=KERNELS):
    """[{kernel, dtype, passes: {name: counts}, instructions, share}]."""
    nvcc, folder = tools()
    if nvcc is None or folder is None:
        raise SystemExit("needed are nvcc, and nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (extra: test)")
    units = {unit: disassemble(unit, nvcc, folder) for unit in dict.fromkeys(k.unit for k in kernels)}
    results = []
    for kernel in kernels:
        for name, lines in units[kernel.unit].items():
            match = re.search(kernel.pattern, name)
            if match is None:
                continue
            dtype = TYPES[match[1]] if match.groups() else "float32"
            size = 4 if dtype == "float32" else 2
            counts = loops_of(parse(lines))
            passes = {step.name: count(counts, step, size) for step in kernel.passes}
            missing = [step for step, found in passes.items() if found is None]
            if missing:
                raise SystemExit(f"{name}: no loop found for {', '.join(missing)}")
            results.append({
                "kernel": kernel.name, "dtype": dtype, "passes": passes,
                "instructions": sum(p["instructions"] for p in passes.values()),
                "share": share(passes.values(), kernel.moved(size)),
            })  # fmt: skip
    return results


def print_table(results):
    columns = ("instructions", "special", "wide_multiplies", "global", "shared")
    print(
        f"{'an element, ' + ARCH:34}{'pass':10}"
        + "".join(f"{c:>16}" for c in columns)
        + "".join(f"{g:>7}" for g in GPUS)
    )
    for r in results:
        for name, p in r["passes"].items():
            print(f"{r['kernel']:25}{r['dtype']:9}{name:10}" + "".join(f"{p[c]:16.2f}" for c in columns))
        shares = "".join(f"{r['share'][gpu]:7.0%}" for gpu in GPUS)
        print(f"{r['kernel']:25}{r['dtype']:9}{'all':10}{r['instructions']:16.2f}" + " " * 64 + shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = measure()
    print_table(results)
    if arguments.json:
        version = subprocess.run([tools()[0], "--version"], capture_output=True, text=True, check=True).stdout
        found = {"arch": ARCH, "nvcc": re.search(r"release ([\d.]+)", version)[1], "results": results}
        write_file(arguments.json, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))


if __name__ == "__main__":
    main()
