"""A gallery of samples."""

from __future__ import annotations

from compared import LENGTH, ROOT, order_of, placed, results, sampled_as, titled

from klflow_ext.files import write_file


def gallery(arguments) -> None:
    """GALLERY.md: the first ten samples of each method, as they came."""
    lines = ["# Samples", "", "The first ten of each run of `benchmarks/method`, top-k 20, as they came: TinyStories, 4 layers, D = 256. Most "
             "begin in the middle of a story, as the pieces do that were trained on.", ""]  # fmt: skip
    for r in sorted(results(), key=lambda r: (r["vocab_size"], placed(r["name"]), r["steps"])):
        in_slices = order_of(r["name"]) == "slices"
        for passes in (LENGTH, 16) if in_slices else (LENGTH,):
            rows = [s for s in r.get("samples", []) if (s["steps"], s["top_k"]) == (passes, 20)]
            rows = [s for s in rows if sampled_as(r["name"], s["method"]) == r["name"]]
            if not rows or r["seed"] != 0 or (r["vocab_size"] != 2048 and not in_slices):
                continue
            lines += [f"## {titled(r['name'])}, V = {r['vocab_size']:,}, {r['steps']:,} steps, {passes} passes: "
                      f"{rows[0]['bits_per_byte']:.2f} bits per byte, entropy {rows[0]['entropy']:.2f}", ""]  # fmt: skip
            for number, text in enumerate(rows[0]["texts"], 1):
                lines.append(f"{number}. {' '.join(text.split()).replace('<|endoftext|>', '⏎')}")
            lines.append("")
            if passes == LENGTH and "filled" in r:
                lines += [
                    f"### {titled(r['name'])}: prompts of 16 tokens continued, holes of 16 tokens filled; 16 passes, top-k 10",
                    "",
                ]
                for number, row in enumerate(r["filled"], 1):
                    row = {name: " ".join(text.split()) for name, text in row.items()}
                    lines.append("{}. {before} **{written}** {after} *(was: {was})*".format(number, **row))
                lines.append("")
        if r["name"] == "stdlib" and "filled" in r:
            lines += [
                f"## A removed line of the standard library's source, filled in; {r['steps']:,} steps, top-k 10",
                "",
            ]
            for row in r["filled"]:
                lines += [
                    "```text",
                    "{before}{written}    # <- written; was: {}{after}".format(row["was"].strip(), **row),
                    "```",
                    "",
                ]
    write_file(ROOT / "GALLERY.md", lambda p: p.write_text("\n".join(lines)))
