"""The claims as text: the table that the command prints, and docs/paper.md."""

from collections.abc import Sequence
from itertools import groupby

from vim_ssl.tasks.paper.claims import CLAIMS, Claim
from vim_ssl.tasks.paper.findings import Finding, combined_state
from vim_ssl.tasks.paper.measure import Settings
from vim_ssl.tasks.paper.rows import Rows, conditions
from vim_ssl.utils.names import markdown_table

HEAD = """\
# The paper, claim by claim

What the Vim paper ([arXiv 2401.09417](https://arxiv.org/abs/2401.09417)) says, and what this
package measured. "Recalled, not checked" marks a published value that was written from memory:
check it in the paper before you quote it. The names of the ablations are those of
[pretraining](pretraining.md#the-papers-other-blocks-and-readouts).

`vim-ssl paper` prints the claims with their states, `vim-ssl paper --run KEY` measures one on a
CPU, scaled down (times and memory with `--pixels 1248`), and `vim-ssl paper --full KEY` at its full
size. This page is written by `vim-ssl paper --page docs/paper.md` from
[`paper.csv`](../benchmarks/results/paper.csv) and the rows of the other benchmarks.

**How a state is decided.** A claim consists of comparisons. What counts is the lower bound of a
comparison's 95 % interval over seeds and test images, or a value that is counted or timed itself.
If it shows no effect, the comparison is *not reproduced*: there is none, or none that this budget
shows; of times and memory, 5 % is no effect. It is *reproduced* if it also reaches the bar: the
published value, or for scaled-down trainings any effect, because points on ImageNet do not carry
over to small images. A claim is *reproduced* if all its comparisons are, *not reproduced* if none
is, and *in part* in all other cases, for example against plain but not against fused attention.
Without a value, or with a single seed, it is *not yet measured*. The intervals are not corrected
for the number of comparisons. For future work there is no published value; the state says whether
an effect is there.
"""
SCALED = """\
`vim-ssl paper --run KEY` repeats a training with several seeds on each image set, with the epochs
that fit into its processor time. One training, on digits:"""


def findings_of(claim: Claim, rows: Rows, settings: Settings) -> list[Finding]:
    """The findings that decide: those of the full size if there are any, else scaled down."""
    full = claim.full.findings(claim.key, rows) if claim.full else []
    scaled = claim.measure.findings(rows, settings) if claim.measure else []
    return full if any(finding.decides for finding in full) else [*scaled, *full]


def state_of(claim: Claim, rows: Rows, settings: Settings) -> str:
    return combined_state(findings_of(claim, rows, settings))


def text_table(claims: Sequence[Claim], rows: Rows, settings: Settings) -> str:
    """Format the claims for a terminal: key, state, and what was measured."""
    width = max(map(len, CLAIMS))
    lines = []
    for section, group in groupby(claims, key=lambda claim: claim.section):
        lines += ["", section]
        for claim in group:
            findings = findings_of(claim, rows, settings)
            lines.append(f"  {claim.key:{width}}  {combined_state(findings):16}  {claim.text}")
            published = f"published {_published(claim)}"
            for text in (published, *map(str, findings)):
                lines.append(f"  {'':{width}}  {'':16}  {text}")
    return "\n".join(lines[1:])


def _published(claim: Claim) -> str:
    return f"{claim.published} ({claim.source})" if claim.source else claim.published


def page(rows: Rows, settings: Settings) -> str:
    """Return the content of docs/paper.md."""
    parts = [HEAD]
    for section, group in groupby(CLAIMS.values(), key=lambda claim: claim.section):
        claims = list(group)
        parts += [f"## {section}", _table(claims, rows, settings)]
        if notes := _notes(claims, rows, settings):
            parts.append("\n".join(notes))
    return "\n\n".join([*(part.strip("\n") for part in parts), *_commands()]) + "\n"


def _table(claims: Sequence[Claim], rows: Rows, settings: Settings) -> str:
    lines = []
    for claim in claims:
        findings = findings_of(claim, rows, settings)
        deciding = [finding for finding in findings if finding.decides] or findings
        ours = "<br>".join(map(str, deciding)) or "-"
        lines.append([f"`{claim.key}`", claim.text, _published(claim), ours,
                      combined_state(findings)])  # fmt: skip
    return markdown_table(["key", "claim", "published", "ours", "state"], lines)


def _notes(claims: Sequence[Claim], rows: Rows, settings: Settings) -> list[str]:
    """Remarks, and the conditions of the section's values."""
    lines = [f"- `{claim.key}`: {claim.remark}" for claim in claims if claim.remark]
    measures = [claim.measure for claim in claims if claim.measure is not None]
    sources = [row for measure in measures for row in measure.sources(rows, settings)]
    if sources:
        lines.append(f"- Measured on: {conditions(sources)}.")
    return lines


def _commands() -> list[str]:
    """What reproduces every claim: scaled down, and at full size."""
    small, full = dict[str, list[str]](), dict[tuple[str, str], list[str]]()
    for claim in CLAIMS.values():
        if claim.measure is not None:
            command = claim.measure.command or "vim-ssl paper --run KEY"
            small.setdefault(command, []).append(claim.key)
        if claim.full is not None:
            lines = "<br>".join(f"`{line}`" for line in claim.full.lines({}))
            full.setdefault((lines, claim.full.needs), []).append(claim.key)
    return [
        "## Commands",
        SCALED,
        markdown_table(["keys", "scaled down"],
                       [[_keys(keys), f"`{command}`"] for command, keys in small.items()]),
        "`vim-ssl paper --full KEY` runs the following, with `--imagenet`, `--coco` and `--ade20k` "
        "for the folders in capitals and `--launch` for several GPUs. None has been run yet.",
        markdown_table(["keys", "full size", "needs"],
                       [[_keys(keys), *known] for known, keys in full.items()]),
    ]  # fmt: skip


def _keys(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
