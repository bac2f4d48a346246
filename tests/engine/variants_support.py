"""What the tests of variants share: a family of three, and a file with a variant to fill in."""

from __future__ import annotations

KERNELS = """
def rows(*, size, rows=1, launch="late", **_):
    return lambda x: (rows, launch)

def refuse(traits):
    return "refused" if traits["size"] == 13 else None
"""

MANY = {"num_tokens": {"min": 64}}
FAMILY = {
    "a": {
        "when": {"size": {"max": 32}},
        "options": {"launch": "late"},
        "numerics": "bits",
        "variants": {
            "pairs": {"options": {"rows": 2}, "when": {"size": {"max": 16}, **MANY}},
            "quads": {"options": {"rows": 4, "launch": "early"}, "when": {"size": 8, "num_tokens": {"min": 512}}},
        },
    },
    "rest": {"when": {"groups": "any"}, "fallback": True},
}

TEXT = """version: 1
ops:
  toy.op:
    contract: {contract}
    implementations:
      a:
        target: {targets}:a
        when:
          platform: [cuda>=sm_80, cpu]
          groups: {max: 4}
          size: {max: 32}
          relations: [size > 1]
        variants:
          b:
            summary: another
            LINES
      c:
        target: {targets}:c
        fallback: true
        when: {platform: any}
"""


def text(*lines):
    return TEXT.replace("LINES", "\n            ".join(lines))
