"""Files that are spoiled, for the tests of all that reads one. KLFLOW_MUTATIONS says how many of each file."""

import json
import os

COUNT = int(os.environ.get("KLFLOW_MUTATIONS", "200"))


def json_mutation(content, generator):
    """One value of it is of another type or size, is missing, or is there twice as deep."""
    value = json.loads(content)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = places[generator.integers(len(places))]
    others = [
        None, True, -1, 0, 1.5, 10**9, 10**12, 10**30, float("inf"), float("nan"), "", "x" * 1000, [], {}, [[]], {"a": 1}, "../x",
        [node[key]], {"tensor": "x"},
    ]  # fmt: skip
    chosen = generator.integers(len(others) + 1)
    if chosen == len(others):
        del node[key]
    else:
        node[key] = others[chosen]
    return json.dumps(value).encode()


def mutation(name, content, others, generator):
    kind = generator.choice(["flip", "cut", "zeros", "swap", "grow", "garbage", *["json"] * 4 * name.endswith(".json")])
    spoiled, size = bytearray(content), len(content)
    at = int(generator.integers(size))
    if kind == "flip":
        near = int(generator.integers(min(size, 400))) if generator.random() < 0.5 else at  # headers are at the start
        spoiled[near] ^= 1 << generator.integers(8)
    elif kind == "cut":
        del spoiled[at:]
    elif kind == "zeros":
        spoiled[at : at + 512] = bytes(len(spoiled[at : at + 512]))
    elif kind == "swap":
        return others[generator.integers(len(others))]
    elif kind == "grow":
        spoiled += bytes(int(generator.integers(1, 5000)))
    elif kind == "garbage":
        return generator.bytes(int(generator.integers(5000)))
    else:
        return json_mutation(content, generator)
    return bytes(spoiled)
