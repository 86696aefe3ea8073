"""The lesson runs from top to bottom, its checks know right from wrong, and it reads without it."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = ROOT / "docs" / "lesson.ipynb"
CELLS = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
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


def printed(cell):
    outputs = cell.get("outputs", ())
    return "".join("".join(output.get("text", "")) for output in outputs)


@pytest.fixture(scope="module")
def lesson():
    """The lesson as it ran, in runs of two steps.

    The exercises have their solutions, but for the last one, whose answer takes whole runs. After
    them come the wrong answers, each with the check of its exercise.
    """
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(LESSON, 4)
    answers, checks = {}, {}
    for cell in notebook.cells:
        if "answer" in cell.metadata.get("tags", ()):
            answers[len(answers) + 1] = cell
        elif cell.source.rpartition("\n")[2].startswith("check("):
            checks[len(checks) + 1] = cell.source
    for number in (1, 2, 3, 4):
        answers[number].source = SOLUTION.format(number)
    new = nbformat.v4.new_code_cell
    notebook.cells += [new(f"{WRONG[number][0]}\n{checks[number]}") for number in WRONG]
    notebook.cells.append(new("print(temporary.name)"))
    resources = {"metadata": {"path": str(LESSON.parent)}}
    patch = pytest.MonkeyPatch()
    patch.setenv("LESSON_STEPS", "2")
    try:
        nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    finally:
        patch.undo()
    return notebook.cells


def test_it_runs_and_draws_with_short_runs(lesson):
    text = "".join(map(printed, lesson[: -len(WRONG)]))
    assert "4 runs in" in text
    drawn = [out for cell in lesson for out in cell.get("outputs", ()) if "png" in str(out)]
    assert len(drawn) >= 7


def test_its_checks_accept_the_solutions(lesson):
    text = "".join(printed(cell) for cell in lesson[: -len(WRONG) - 1] if "outputs" in cell)
    for number in (1, 2, 3, 4):
        assert f"Exercise {number}: right." in text
    assert "Exercise 5: not answered yet." in text


def test_its_checks_say_what_to_look_at_after_a_wrong_answer(lesson):
    for number, cell in zip(WRONG, lesson[-len(WRONG) - 1 :], strict=False):
        assert f"Exercise {number}: not yet. Look at" in printed(cell)
        assert WRONG[number][1] in printed(cell)


def test_it_leaves_no_files(lesson):
    assert not Path(printed(lesson[-1]).strip()).exists()


def test_its_outputs_are_committed_and_unanswered():
    assert all(cell["execution_count"] for cell in CODE)
    assert not [output for output in OUTPUTS if output["output_type"] == "error"]
    pictures = [output for output in OUTPUTS if "image/png" in output.get("data", {})]
    assert len(pictures) >= 7
    text = "".join(map(printed, CODE))
    assert "4 runs in" in text
    assert text.count("not answered yet") == 5


def test_its_outputs_name_no_folder_of_a_machine():
    texts = [json.dumps(output.get("text", "")) for output in OUTPUTS]
    texts += [str(output.get("data", {}).get("text/plain", "")) for output in OUTPUTS]
    assert not [text for text in texts if re.search(r"/(tmp|root|home|work|usr)\b", text)]


def test_its_cells_are_short():
    for cell in CODE:
        lines = "".join(cell["source"]).splitlines()
        assert len(lines) <= 30
        assert max(map(len, lines)) <= 100


def test_it_writes_nothing_of_the_loss_again():
    source = "\n".join("".join(cell["source"]) for cell in CODE)
    for name in ("softmax", "relu", "clamp", "np.maximum", "exp("):
        assert name not in source
    for name in ("token_weights", "smoothing_loss", "epo_loss", "batch_loss", "plot.tokens"):
        assert f"{name}(" in source


def test_links_of_its_text_lead_somewhere():
    text = "\n".join(TEXT)
    # a notebook's headings keep their capitals
    anchors = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 8
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif "://" not in link:
            assert (LESSON.parent / link).exists(), link
