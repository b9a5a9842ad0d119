"""How do runs look as rows of the paper's tables? The same columns, order and decimals, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    '"': r"\textquotedblright{}",
}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {mark: rf"\{mark}" for mark in "&%$#_{}"}
# Besides ASCII and the accented letters of Latin-1 and Latin Extended-A, without further packages.
_SET_BY_LATEX = frozenset("ßæøåœÆØÅŒłŁı–—‘’“”…")  # noqa: RUF001
_ACCENTED_BELOW = "\u0180"
_ACCENTS = frozenset(map(chr, (0x300, 0x301, 0x302, 0x303, 0x304, 0x306, 0x307, 0x308, 0x30A, 0x30B, 0x30C, 0x327)))
_ROWS_OF_FLOAT = 45  # with head, caption and notes well below a page
_LETTERS_OF_TAG = 24
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
        others: benchmarks that the paper does not have, where `vqa` and `loc` are the paper's.
        rows: the runs, then published rows.
    """

    vqa: tuple[str, ...]
    loc: tuple[str, ...]
    others: tuple[str, ...]
    rows: tuple[TableRow, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of scores, in the paper's order, then the others."""
        return (*self.vqa, WEIGHTED_VQA, *self.loc, WEIGHTED_LOC, WEIGHTED_OVERALL, *self.others)

    def best(self, column: str) -> str | None:
        """The highest printed score of a column, of those that cover the whole benchmark."""
        values = [row.scores[column] for row in self.rows if column in row.scores and column not in row.partial]
        return printed(max(values)) if values else None


def paper_table(report: Report) -> PaperTable:
    """The table of a report."""
    papers = bool(report.published) or any(name in PAPER_QUESTIONS for name in report.benchmarks)
    vqa = tuple(VQA_QUESTIONS) if papers else tuple(report.text_benchmarks)
    loc = tuple(LOC_QUESTIONS) if papers else tuple(report.box_benchmarks)
    others = tuple(name for name in report.benchmarks if name not in (*vqa, *loc))
    rows = [_row_of_run(run, vqa, loc, others) for run in report.runs]
    return PaperTable(vqa=vqa, loc=loc, others=others, rows=(*rows, *map(_row_of_paper, report.published)))


def _row_of_paper(row: PaperRow) -> TableRow:
    printed_row = row.published
    averages = {
        WEIGHTED_VQA: printed_row.weighted_vqa,
        WEIGHTED_LOC: printed_row.weighted_loc,
        WEIGHTED_OVERALL: printed_row.weighted_overall,
    }
    return TableRow(run="", model=printed_row.model, scores={**printed_row.scores, **averages})


def _row_of_run(run: RunData, vqa: Sequence[str], loc: Sequence[str], others: Sequence[str]) -> TableRow:
    scores = {name: run.scores[name].score for name in (*vqa, *loc, *others) if name in run.scores}
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
    """How questions were worded and boxes compared; several texts only if the benchmarks differ in that.

    Benchmarks whose wording is the same either way say nothing beside others.
    """
    every = list(scores)
    telling = [score for score in every if score.boxes or score.wording != "default"]
    said = sorted({score.made_with for score in telling or every})
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
    """Tables as the paper has them, text answers, boxes, and benchmarks that the paper does not have.

    They need booktabs and graphicx, are as wide as the page at most, and go on in further floats where rows are many.
    The best of each column is bold. A model without any score in a table is not in it.
    """
    tables = [
        ([*table.vqa, WEIGHTED_VQA], "Results on VQA benchmarks."),
        ([*table.loc, WEIGHTED_LOC, *([WEIGHTED_OVERALL] if table.vqa else [])], "Results on localization benchmarks."),
        ([*table.others], "Results on other benchmarks."),
    ]
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
    unset = [row.run for row in table.rows if "?" in escaped(row.run) and "?" not in row.run]
    lines += [f"% with ? for what LaTeX cannot set without further packages: {name}" for name in unset]
    for columns, caption in tables:
        rows = tuple(row for row in table.rows if any(name in row.scores for name in columns))
        if rows:
            lines += _latex_table(replace(table, rows=rows), columns, caption)
    return "\n".join([*lines, ""])


def _latex_table(table: PaperTable, columns: Sequence[str], caption: str) -> list[str]:
    """Floats that together are one table, so that none is higher than a page."""
    rows, notes = _latex_rows(table, columns), _notes(table, columns)
    names = [*_OF_MODEL_IN_LATEX, *columns]
    heads = [TITLES.get(name, (title_of(name), "")) for name in names]
    lines = []
    for start in range(0, len(rows), _ROWS_OF_FLOAT):
        lines += [
            r"\begin{table*}[tp]",
            r"\centering",
            rf"\caption{{{caption}}}"
            if start == 0
            else rf"\addtocounter{{table}}{{-1}}\caption{{{caption[:-1]}, continued.}}",
            r"\scriptsize\setlength{\tabcolsep}{3pt}",
            r"\sbox0{%",
            rf"\begin{{tabular}}{{llrrr{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(escaped(head) for head, _ in heads) + r" \\",
            " & ".join(escaped(head) for _, head in heads) + r" \\",
            r"\midrule",
            *rows[start : start + _ROWS_OF_FLOAT],
            r"\bottomrule",
            r"\end{tabular}}",
            r"\ifdim\wd0>\textwidth\resizebox{\textwidth}{!}{\usebox0}\else\usebox0\fi",
            *([r"\par\smallskip\raggedright " + " ".join(notes)] if notes else []),
            r"\end{table*}",
        ]
    return lines


def _latex_rows(table: PaperTable, columns: Sequence[str]) -> list[str]:
    best = {name: table.best(name) for name in columns}
    looks = Counter(tuple(_model_cell(row, name) for name in _OF_MODEL_IN_LATEX) for row in table.rows if row.run)
    tags = _tags(table)
    lines = []
    for number, row in enumerate(table.rows):
        cells = [_model_cell(row, name) for name in _OF_MODEL_IN_LATEX]
        if row.run and (looks[tuple(cells)] > 1 or tags[row.run] != row.run):
            cells[_OF_MODEL_IN_LATEX.index("encoder")] += f" ({escaped(tags[row.run])})"
        cells += [_score_cell(row, name, best[name]) for name in columns]
        begins_published = number and table.rows[number - 1].run and not row.run
        lines.append((r"\midrule " if begins_published else "") + " & ".join(cells) + r" \\")
    return lines


def _tags(table: PaperTable) -> dict[str, str]:
    """What a run is called within a LaTeX table: its name, or a number where any name is too long for a cell."""
    runs = [row.run for row in table.rows if row.run]
    if len(runs) == 1 or all(len(run) <= _LETTERS_OF_TAG for run in runs):
        return {run: run for run in runs}
    return {run: f"run {number}" for number, run in enumerate(runs, start=1)}


def _notes(table: PaperTable, columns: Sequence[str]) -> list[str]:
    """What stands below a LaTeX table: the dagger, where the published rows begin, and remarks, equal ones together."""
    notes = []
    if any(name in row.partial for row in table.rows for name in columns):
        notes.append(rf"{DAGGER} not over all of the benchmark's questions, or not over the paper's.")
    runs = [row for row in table.rows if row.run]
    if runs and len(runs) < len(table.rows):
        notes.append("Below the line: as published.")
    tags = _tags(table)
    notes += [f"{tag}: {escaped(run)}." for run, tag in tags.items() if run != tag]
    said: dict[str, list[str]] = {}
    for row in runs:
        said.setdefault("; ".join(row.remarks(columns)), []).append(tags[row.run])
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
    return "".join(_LATEX.get(mark, mark if _is_set(mark) else "?") for mark in text)


def _is_set(mark: str) -> bool:
    """Whether LaTeX sets the character in any document."""
    parts = unicodedata.normalize("NFD", mark)
    accented = mark < _ACCENTED_BELOW and parts[0].isascii() and parts[0].isprintable()
    return mark in _SET_BY_LATEX or (accented and _ACCENTS.issuperset(parts[1:]))
