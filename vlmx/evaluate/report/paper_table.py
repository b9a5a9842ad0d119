"""How do runs look as rows of the paper's tables? The same columns, order and decimals, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from vlmx.evaluate.aggregate import LOC_QUESTIONS, VQA_QUESTIONS, average
from vlmx.evaluate.beside import PAPER_QUESTIONS, part_of, weights_of
from vlmx.evaluate.paper_rows import PaperRow
from vlmx.evaluate.report.collect import Report
from vlmx.evaluate.report.run_data import RunData
from vlmx.evaluate.score import Score

MODEL = ("pretrained", "encoder", "connector", "params", "in1k", "image_size", "tokens")
WEIGHTED_VQA, WEIGHTED_LOC, WEIGHTED_OVERALL = "weighted_vqa", "weighted_loc", "weighted_overall"
TITLES: Mapping[str, tuple[str, str]] = {  # the two lines of the paper's heads
    "pretrained": ("Pretrained", "Dataset"),
    "encoder": ("Visual", "Encoder"),
    "params": ("Encoder", "Size"),
    "image_size": ("Image", "Size"),
    "tokens": ("Vision", "Token #"),
    "vqav2": ("VQA-v2", ""),
    "gqa": ("GQA", ""),
    "vizwiz": ("VizWiz", ""),
    "textvqa_ocr": ("TextVQA", "+OCR"),
    "textvqa": ("TextVQA", ""),
    "pope": ("POPE", ""),
    "tallyqa": ("TallyQA", ""),
    WEIGHTED_VQA: ("Weighted", "VQA"),
    "refcoco": ("RefCOCO", ""),
    "refcoco+": ("RefCOCO+", ""),
    "refcocog": ("RefCOCOg", ""),
    "ocid_ref": ("OCID-Ref", ""),
    WEIGHTED_LOC: ("Weighted", "Loc."),
    WEIGHTED_OVERALL: ("Weighted", "Overall"),
}
_OF_MODEL_IN_LATEX = ("pretrained", "encoder", "params", "image_size", "tokens")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {mark: rf"\{mark}" for mark in "&%$#_{}"}
DAGGER = r"\textsuperscript{\textdagger}"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One model.

    Attributes:
        run: name of the run; "" for a row that the paper printed.
        model: MODEL's columns as text.
        scores: percent by column, averages included; columns without a score are not in it.
        partial: columns whose score is over other questions than all of the benchmark.
        data: the run with all that is known of it; None for a row that the paper printed.
    """

    run: str
    model: Mapping[str, str]
    scores: Mapping[str, float]
    partial: frozenset[str] = frozenset()
    data: RunData | None = None

    def remarks(self, columns: Sequence[str]) -> tuple[str, ...]:
        """What a reader has to know about the scores in these columns."""
        return () if self.data is None else remarks_of(self.data, columns)


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """Rows and the columns that they have.

    Attributes:
        vqa, loc: benchmarks of the two groups: the paper's eleven, or others where the runs have none of these.
        rows: the runs, then published rows.
    """

    vqa: tuple[str, ...]
    loc: tuple[str, ...]
    rows: tuple[TableRow, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of scores, in the paper's order."""
        return (*self.vqa, WEIGHTED_VQA, *self.loc, WEIGHTED_LOC, WEIGHTED_OVERALL)

    def best(self, column: str) -> str | None:
        """The highest printed score of a column, of those that cover the whole benchmark."""
        values = [row.scores[column] for row in self.rows if column in row.scores and column not in row.partial]
        return printed(max(values)) if values else None


def paper_table(report: Report) -> PaperTable:
    """The table of a report."""
    papers = bool(report.published) or any(name in PAPER_QUESTIONS for name in report.benchmarks)
    vqa = tuple(VQA_QUESTIONS) if papers else tuple(report.text_benchmarks)
    loc = tuple(LOC_QUESTIONS) if papers else tuple(report.box_benchmarks)
    rows = [_row_of_run(run, vqa, loc) for run in report.runs]
    return PaperTable(vqa=vqa, loc=loc, rows=(*rows, *map(_row_of_paper, report.published)))


def _row_of_paper(row: PaperRow) -> TableRow:
    printed_row = row.published
    averages = {
        WEIGHTED_VQA: printed_row.weighted_vqa,
        WEIGHTED_LOC: printed_row.weighted_loc,
        WEIGHTED_OVERALL: printed_row.weighted_overall,
    }
    return TableRow(run="", model=printed_row.model, scores={**printed_row.scores, **averages})


def _row_of_run(run: RunData, vqa: Sequence[str], loc: Sequence[str]) -> TableRow:
    scores = {name: run.scores[name].score for name in (*vqa, *loc) if name in run.scores}
    partial = {name for name in scores if part_of(run.scores[name])}
    for average_name, members in ((WEIGHTED_VQA, vqa), (WEIGHTED_LOC, loc), (WEIGHTED_OVERALL, (*vqa, *loc))):
        if members and all(name in scores for name in members):
            weights = weights_of(run.scores[name] for name in members)
            scores[average_name] = average({name: scores[name] for name in members}, weights)[0]
            if partial & set(members):
                partial.add(average_name)
    return TableRow(
        run=run.name,
        model=_model(run),
        scores=scores,
        partial=frozenset(partial),
        data=run,
    )


def _model(run: RunData) -> dict[str, str]:
    if run.own_row is not None:
        return dict(run.own_row.published.model)
    spec = run.spec.get("parts", [run.spec])[0]
    size = f"{spec['geometry']['height']}x{spec['geometry']['width']}" if spec else ""
    rows, columns = run.card.get("grid", (0, 0))
    return {
        **dict.fromkeys(MODEL, ""),
        "encoder": run.encoder,
        "connector": run.connector,
        "image_size": size,
        "tokens": str(rows * columns) if rows else "",
    }


def remarks_of(run: RunData, benchmarks: Collection[str] | None = None) -> tuple[str, ...]:
    """What a reader of a run's numbers has to know: parts of benchmarks, wording, how boxes were compared.

    Args:
        run: what is read.
        benchmarks: those whose numbers are; None: all of the run.
    """
    scores = {name: score for name, score in run.scores.items() if benchmarks is None or name in benchmarks}
    found = [f"{name}: {part}" for name, score in scores.items() if (part := part_of(score))]
    found += [f"{name}: {score.invalid:,} answers not readable" for name, score in scores.items() if score.invalid]
    return (*found, *made_with(scores.values()))


def made_with(scores: Iterable[Score]) -> list[str]:
    """How questions were worded and boxes compared; several texts only if the benchmarks differ in that."""
    said = sorted({score.made_with for score in scores})
    return [text for text in said if not any(other.startswith(f"{text};") for other in said)]


def title_of(name: str) -> str:
    """A column's name as the page shows it: "TextVQA+OCR"; the mini study's without its "mini-"."""
    first, second = TITLES.get(name, (name.removeprefix("mini-"), ""))
    return first + (second if second.startswith("+") else f" {second}".rstrip())


def printed(value: float) -> str:
    """Two decimals, rounded half up, as the paper prints."""
    return str(Decimal(str(value)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def to_csv(table: PaperTable) -> str:
    """CSV with the columns of the paper's result table; behind them the run's name and remarks."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*MODEL, *table.columns, "run", "remarks"])
    for row in table.rows:
        scores = [printed(row.scores[name]) if name in row.scores else "" for name in table.columns]
        writer.writerow([*(row.model[name] for name in MODEL), *scores, row.run, "; ".join(row.remarks(table.columns))])
    return buffer.getvalue()


def to_latex(table: PaperTable) -> str:
    """Two tables as the paper has them, text answers and boxes; needs booktabs. The best of each column is bold."""
    parts = []
    if table.vqa:
        parts.append(_latex_table(table, [*table.vqa, WEIGHTED_VQA], "Results on VQA benchmarks."))
    if table.loc:
        columns = [*table.loc, WEIGHTED_LOC, *([WEIGHTED_OVERALL] if table.vqa else [])]
        parts.append(_latex_table(table, columns, "Results on localization benchmarks."))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def _latex_table(table: PaperTable, columns: Sequence[str], caption: str) -> str:
    names = [*_OF_MODEL_IN_LATEX, *columns]
    heads = [TITLES.get(name, (name, "")) for name in names]
    best = {name: table.best(name) for name in columns}
    lines = [
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{llrrr{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(escaped(head) for head, _ in heads) + r" \\",
        " & ".join(escaped(head) for _, head in heads) + r" \\",
        r"\midrule",
    ]
    looks = Counter(tuple(_model_cell(row, name) for name in _OF_MODEL_IN_LATEX) for row in table.rows if row.run)
    for number, row in enumerate(table.rows):
        if number and table.rows[number - 1].run and not row.run:
            lines.append(r"\midrule")
        cells = [_model_cell(row, name) for name in _OF_MODEL_IN_LATEX]
        if looks[tuple(cells)] > 1 and row.run:
            cells[_OF_MODEL_IN_LATEX.index("encoder")] += f" ({escaped(row.run)})"
        cells += [_score_cell(row, name, best[name]) for name in columns]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = _notes(table, columns)
    if notes:
        lines.append(r"\par\smallskip\footnotesize " + " ".join(notes))
    return "\n".join([*lines, r"\end{table*}", ""])


def _notes(table: PaperTable, columns: Sequence[str]) -> list[str]:
    """What stands below a LaTeX table: the dagger, where the published rows begin, and remarks, equal ones together."""
    notes = []
    if any(name in row.partial for row in table.rows for name in columns):
        notes.append(rf"{DAGGER} not over all of the benchmark's questions, or not over the paper's.")
    runs = [row for row in table.rows if row.run]
    if runs and len(runs) < len(table.rows):
        notes.append("Below the line: as published.")
    said: dict[str, list[str]] = {}
    for row in runs:
        said.setdefault("; ".join(row.remarks(columns)), []).append(row.run)
    for text, names in said.items():
        if not text:  # it has no score in this table
            continue
        who = "" if len(said) == 1 else f"{escaped(', '.join(names))}: "
        notes.append(f"{who}{escaped(text)}.")
    return notes


def _model_cell(row: TableRow, name: str) -> str:
    text = escaped(row.model[name])
    if name == "encoder" and row.model["connector"] == "mlp3":
        text += "(f)"
    return text.replace("x", r"$\times$") if name == "image_size" else text


def _score_cell(row: TableRow, name: str, best: str | None) -> str:
    if name not in row.scores:
        return "--"
    text = printed(row.scores[name])
    if name in row.partial:
        return text + DAGGER
    return rf"\textbf{{{text}}}" if text == best else text


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(mark, mark) for mark in text)
