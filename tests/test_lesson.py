"""The lesson runs from top to bottom, its checks know right from wrong, and it reads without it."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = ROOT / "docs" / "lesson.ipynb"
CELLS = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOLUTION = """import runpy
answer_{0} = runpy.run_path("docs/lesson_solutions.py")["answer_{0}"]"""
# wrong answers, and what their checks then name
WRONG = {
    1: ("answer_1 = (0.375, 0.35, 1 / 6)", "the weight; the table of section 2"),
    2: ('answer_2 = {"loss", "entropy"}', "what changes where the gradient does not?"),
    3: ("answer_3 = 0.5", "draw_corridor with the smallest β_k"),
    4: ("answer_4 = lambda batch: 0.1", "the floor is half of it"),
    5: ("answer_5 = 2", "the right panel, steps 30 to 39"),
}


def outputs(cells):
    return [output for cell in cells for output in cell.get("outputs", ())]


def printed(cells):
    return "".join("".join(output.get("text", "")) for output in outputs(cells))


def pictures(cells):
    return sum("image/png" in output.get("data", {}) for output in outputs(cells))


@pytest.fixture(scope="module")
def lesson():
    """The lesson as it ran, in runs of two steps -> its cells, and those of the wrong answers.

    The exercises have their solutions, but for the last one, whose answer takes whole runs.
    """
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(LESSON, 4)
    is_check = lambda cell: cell.source.rpartition("\n")[2].startswith("check(")
    answers = [cell for cell in notebook.cells if "answer" in cell.metadata.get("tags", ())]
    checks = [cell.source for cell in notebook.cells if is_check(cell)]
    for number in (1, 2, 3, 4):
        answers[number - 1].source = SOLUTION.format(number)
    new = nbformat.v4.new_code_cell
    wrong = [new(f"{WRONG[n][0]}\n{check}") for n, check in enumerate(checks, 1)]
    cells = list(notebook.cells)
    notebook.cells += [*wrong, new("print(temporary.name)")]
    resources = {"metadata": {"path": str(LESSON.parent)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESSON_STEPS", "2")
        nbclient.NotebookClient(notebook, timeout=None, resources=resources).execute()
    return cells, notebook.cells[len(cells) :]


def test_it_runs_draws_and_leaves_no_files(lesson):
    cells, (*_, folder) = lesson
    assert "4 runs in" in printed(cells)
    assert pictures(cells) >= 7
    assert not Path(printed([folder]).strip()).exists()


def test_its_checks_know_right_from_wrong(lesson):
    cells, (*wrong, _) = lesson
    for number in (1, 2, 3, 4):
        assert f"Exercise {number}: right." in printed(cells)
    assert "Exercise 5: not answered yet." in printed(cells)
    for (number, (_, hint)), cell in zip(WRONG.items(), wrong, strict=True):
        assert f"Exercise {number}: not yet. Look at" in printed([cell])
        assert hint in printed([cell])


def test_its_outputs_are_committed_and_unanswered():
    assert all(cell["execution_count"] for cell in CODE)
    assert "error" not in {output["output_type"] for output in outputs(CODE)}
    assert pictures(CODE) >= 7
    assert "4 runs in" in printed(CODE)
    assert printed(CODE).count("not answered yet") == 5
    # no folder of a machine; pictures and widgets hold none
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs(CODE)]
    assert not re.search(r"/(tmp|root|home|work|usr)\b", printed(CODE) + str(shown))


def test_its_cells_are_short_and_write_nothing_of_the_loss_again():
    sources = ["".join(cell["source"]) for cell in CODE]
    for source in sources:
        assert len(source.splitlines()) <= 30
        assert max(map(len, source.splitlines())) <= 100
    code = "\n".join(sources)
    assert not re.search(r"softmax|relu|clamp|np\.maximum|exp\(", code)
    for name in ("token_weights", "smoothing_loss", "epo_loss", "batch_loss", "plot.tokens"):
        assert f"{name}(" in code


def test_links_of_its_text_lead_somewhere():
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    # a notebook's headings keep their capitals
    anchors = {"#" + heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 8
    for link in links:
        assert link in anchors or (LESSON.parent / link).is_file(), link
