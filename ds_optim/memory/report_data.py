"""The parts of a memory report, as plain data: its JSON is this as it stands.

`report` makes it; `report_html`, `report_text` and `charts` show it.
"""

from __future__ import annotations

from typing import get_args

from ds_optim.memory.claims import Verdict
from ds_optim.memory.paper_tables import PaperRow
from ds_optim.memory.record import Category, Phase, Record, Sample, StrictModel
from ds_optim.memory.report_provenance import CheckRow


class Headline(StrictModel):
    """One number of the verdict.

    Attributes:
        name: what it is.
        counted: what is in it, in words.
        bytes: on the fullest rank; None where the record does not say.
        baseline: the same of the baseline.
    """

    name: str
    counted: str
    bytes: int | None
    baseline: int | None

    @property
    def change(self) -> float | None:
        """Relative to the baseline: -0.5 is half of it."""
        return self.bytes / self.baseline - 1 if self.bytes is not None and self.baseline else None


class Unaccounted(StrictModel):
    """The moment of the measured run at which most bytes were nobody's."""

    rank: int
    bytes: int
    total: int

    @property
    def share(self) -> float:
        return self.bytes / self.total if self.total else 0.0


class Bar(StrictModel):
    """One stack: whose, and its bytes in the order of `STACK`."""

    who: str
    bytes: dict[Category, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Group(StrictModel):
    """The bars of one rank, the baseline first."""

    label: str
    bars: list[Bar]


class Panel(StrictModel):
    """The ranks at one moment."""

    title: str
    groups: list[Group]


class QuantityRow(StrictModel):
    """One quantity, predicted and measured."""

    name: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None where only the prediction is not 0."""
        return self.predicted / self.measured if self.measured else (None if self.predicted else 1.0)

    @property
    def residual(self) -> int:
        """Measured less predicted."""
        return self.measured - self.predicted


class Section(StrictModel):
    """Some quantities of one moment.

    Attributes:
        lines: the last of them is the sum.
        main: whether a short report shows all of it: the model states and the highest peak.
    """

    title: str
    lines: list[QuantityRow]
    main: bool


class Comparison(StrictModel):
    """Predicted against measured, for one run.

    Attributes:
        who: the run.
        rank: measured rank; the predicted one is the same, or the fullest if that one was not predicted.
    """

    who: str
    rank: int
    predicted_rank: int
    sections: list[Section]


class StepCourse(StrictModel):
    """One step of one rank."""

    who: str
    rank: int
    samples: list[Sample]

    @property
    def idle(self) -> list[Phase]:
        """Phases that allocated nothing, and so have no width."""
        return [phase for phase in get_args(Phase) if all(sample.phase != phase for sample in self.samples)]


class StateRow(StrictModel):
    """One kind of state. Bytes and elements on the fullest rank, and bytes on all the ranks of the record."""

    who: str
    key: str
    dtype: str
    shape_rule: str
    elements: int
    bytes: int
    all_ranks: int


class HostRow(StrictModel):
    """What a host holds, all of its ranks together, or one of its ranks. Bytes.

    Attributes:
        rank: None for the host as a whole.
        states: parameters, master, gradients and optimizer state.
        state: of the optimizer.
        peak: of what devices must hold; of a host, the sum over its ranks.
    """

    who: str
    host: str
    rank: int | None
    states: int
    state: int
    peak: int


class Report(StrictModel):
    """Everything that the page, the Markdown and the terminal show.

    Attributes:
        title: who beside whom.
        names: of the run and of the baseline.
        kind: of the numbers: ``measured``, ``predicted``, or both words where the two runs differ.
        notices: what a reader must know before comparing.
        capacity: of the device, bytes; None if no record knows it.
        hosts: of runs on several hosts, each host followed by its ranks.
        provenance: (name, value per run).
        methods: (run, category, how it was counted).
        records: what all of it was made from.
    """

    title: str
    names: list[str]
    kind: str
    notices: list[str]
    headlines: list[Headline]
    unaccounted: Unaccounted | None
    verdicts: list[Verdict]
    capacity: int | None
    panels: list[Panel]
    comparisons: list[Comparison]
    timelines: list[StepCourse]
    state: list[StateRow]
    hosts: list[HostRow]
    paper: list[PaperRow]
    provenance: list[tuple[str, list[str]]]
    methods: list[tuple[str, list[str]]]
    checks: list[CheckRow]
    records: list[Record]
